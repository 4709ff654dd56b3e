"""The runtime is what is copied to the device: it must run where neither torch nor the ONNX writers exist."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ABSENT_ON_A_DEVICE = ("torch", "onnx", "onnx_ir", "ml_dtypes", "matplotlib")

SCRIPT = f"""
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {ABSENT_ON_A_DEVICE!r}:
            raise ImportError(f"{{name}} is blocked: the runtime must not need it")
sys.meta_path.insert(0, Block())
from retnet_export.runtime import load
print("".join(load(sys.argv[1]).generate("In the beginning", max_new_tokens=8, temperature=0.0)))
"""


def test_a_bundle_generates_where_torch_and_onnx_cannot_be_imported(example_bundle):
    done = subprocess.run([sys.executable, "-c", SCRIPT, str(example_bundle.path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


def test_the_runtime_names_no_module_above_it():
    import retnet_export.runtime

    folder = Path(retnet_export.runtime.__file__).parent
    for file in folder.rglob("*.py"):
        for above in ("export", "quantize", "compare", "graph", "commands", "cli"):
            assert f"retnet_export.{above} " not in file.read_text(), f"{file} imports upwards"
            assert f"from retnet_export.{above}" not in file.read_text(), f"{file} imports upwards"
