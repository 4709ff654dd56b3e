#!/usr/bin/env bash
# Runs the whole path on a Jetson and writes one report: scripts/jetson-check.sh BUNDLE [REPORT]
# RETNET_BENCH holds further options of `bench`, to make it shorter.
# Attach the report to an issue; it holds no names of users or hosts. Every step runs, even if an earlier one failed.
set -u
bundle=${1:?usage: scripts/jetson-check.sh BUNDLE [REPORT]}
report=${2:-jetson-report.txt}
prompt='In the beginning'
failed=0
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT

step() { # step TITLE COMMAND...: run it, put its output under the title
    local title=$1
    shift
    printf '\n=== %s\n$ %s\n' "$title" "$*"
    if "$@" 2>&1 </dev/null; then printf '[ok]\n'; else printf '[FAILED: exit %d]\n' "$?"; failed=$((failed + 1)); fi
}
bench() { # bench BACKEND: as JSON, kept for the line at the end
    retnet-export bench "$bundle" --backend "$1" --json ${RETNET_BENCH:-} >"$scratch/bench-$1.json" && cat "$scratch/bench-$1.json"
}
as_json() { # everything that a program reads of this report, on one line
    retnet-export doctor --json >"$scratch/doctor.json"
    python3 - "$scratch" <<'PY'
import json, pathlib, sys

def read(path):
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return None

folder = pathlib.Path(sys.argv[1])
benches = [found for path in sorted(folder.glob("bench-*.json")) if (found := read(path)) is not None]
document = {"format": "retnet-export field report", "format_version": 1, "doctor": read(folder / "doctor.json"), "bench": benches}
print(json.dumps(document))
PY
}
look() { # look TITLE COMMAND...: likewise, but a machine may lack it
    local title=$1
    shift
    printf '\n=== %s\n' "$title"
    "$@" 2>/dev/null </dev/null || printf 'not here\n'
}

{
    printf 'retnet-export on a Jetson, %s\n' "$(date -u +%Y-%m-%dT%H:%MZ)"
    look 'board' sh -c "tr -d '\\0' </proc/device-tree/model"
    look 'release' cat /etc/nv_tegra_release
    look 'power mode' nvpmodel -q
    look 'memory' free -m
    look 'tegrastats' sh -c 'timeout 2 tegrastats --interval 500 | head -2'
    step 'doctor' retnet-export doctor
    step 'bundle' retnet-export inspect "$bundle"
    step 'compile' retnet-export compile "$bundle" --json
    step 'generate, ONNX Runtime on the CPU' retnet-export generate "$bundle" --prompt "$prompt" --max-new-tokens 64 --temperature 0 --backend onnxruntime --stats
    for backend in cuda tensorrt; do
        step "generate, $backend" retnet-export generate "$bundle" --prompt "$prompt" --max-new-tokens 64 --temperature 0 --backend $backend --stats
        step "speed and power, $backend" retnet-export generate "$bundle" --prompt "$prompt" --max-new-tokens 512 --temperature 0 --backend $backend --stats --power
    done
    for backend in onnxruntime cuda tensorrt; do
        step "bench, $backend" bench $backend
    done
    look 'memory afterwards' free -m
    printf '\n=== for `retnet-export plan --calibrate`\n'
    as_json
    printf '\n%d steps failed\n' "$failed"
} | tee "$report"
printf '\nwritten: %s\n' "$report"
grep -q '^0 steps failed$' "$report"
