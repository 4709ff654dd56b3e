"""`generate` and `chat` from the outside: what they print, save and refuse."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tiny
from conftest import EXAMPLE
from typer.testing import CliRunner

from retnet_export.cli import app
from retnet_export.commands.sampling import unescaped
from retnet_export.runtime.generate.state import Snapshot
from retnet_export.runtime.model import load


@pytest.fixture
def bundle(example_bundle) -> Path:
    return example_bundle.path


def run(*arguments: object, text: str | None = None, code: int = 0):
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], input=text)
    assert result.exit_code == code, result.output
    assert "Traceback" not in result.output
    return result


def generated(*arguments: object, **options) -> dict:
    return json.loads(run("generate", *arguments, "--json", **options).stdout)


def test_a_long_prompt_is_read_once_and_gone_on_from(bundle, tmp_path):
    state, greedy = tmp_path / "prompt.state", ("--temperature", 0)
    whole = generated(bundle, "--prompt", "In the beginning God created", "--max-new-tokens", 12, *greedy)
    run("generate", bundle, "--prompt", "In the beginning", "--max-new-tokens", 0, "--save-state", state)
    after = generated(bundle, "--load-state", state, "--prompt", " God created", "--max-new-tokens", 12, *greedy)
    assert after["text"] == whole["text"]
    assert after["stats"]["prompt_tokens"] < whole["stats"]["prompt_tokens"]


def test_text_without_a_prompt_continues_from_the_saved_logits(bundle, tmp_path):
    state, options = tmp_path / "prompt.state", ("--temperature", 0, "--max-new-tokens", 10)
    expected = generated(bundle, "--prompt", "In the beginning", *options)["text"]
    run("generate", bundle, "--prompt", "In the beginning", "--max-new-tokens", 0, "--save-state", state)
    assert generated(bundle, "--load-state", state, *options)["text"] == expected


def test_a_state_of_another_model_is_refused_before_anything_runs(bundle, tmp_path):
    (tmp_path / "odd.state").write_bytes(b"nothing")
    result = run("generate", bundle, "--load-state", tmp_path / "odd.state", code=1)
    assert "odd.state: not a saved state" in result.stderr
    assert result.stdout == ""


def test_a_state_that_cannot_be_saved_is_refused_before_the_prompt_is_read(bundle, tmp_path):
    result = run("generate", bundle, "--prompt", "x", "--save-state", tmp_path / "absent" / "s", code=1)
    assert "does not exist" in result.stderr


def test_many_prompts_give_a_json_line_each_equal_to_single_runs(bundle, tmp_path):
    prompts = ["In the beginning", "O Romeo", "And it came to pass", "To be", "Sing, heavenly muse"]
    (tmp_path / "prompts.txt").write_text("\n".join(prompts) + "\n\n")
    options = ("--seed", 5, "--max-new-tokens", 10)
    lines = run("generate", bundle, "--prompts", tmp_path / "prompts.txt", "--batch", 2, *options).stdout.splitlines()
    records = [json.loads(line) for line in lines]
    assert [record["prompt"] for record in records] == prompts
    for record in records:
        single = generated(bundle, "--prompt", record["prompt"], "--max-new-tokens", 10, "--seed", record["seed"])
        assert single["text"] == record["text"]


def test_json_lines_bring_options_of_their_own(bundle, tmp_path):
    file = tmp_path / "prompts.jsonl"
    file.write_text('"In the beginning"\n{"prompt": "O Romeo", "max_new_tokens": 3, "temperature": 0, "stop": ["zzz"]}\n')
    document = generated(bundle, "--prompts", file, "--max-new-tokens", 6, "--logprobs", 1)
    first, second = document["completions"]
    assert len(first["tokens"]) == 6
    assert len(second["tokens"]) == 3
    assert all(token["top"][0]["id"] == token["id"] for token in second["tokens"])
    assert document["stats"]["new_tokens"] == 9


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{broken", "line 1: not valid JSON"),
        ('"fine"\n{"prompt": 3}', "line 2.prompt: expected a text or a list of token ids, found 3"),
        ('{"text": "x"}', "line 1: the field 'prompt' is missing"),
        ('{"prompt": "x", "top_p": 7}', "top_p is 7.0"),
        ("\n\n", "it has no prompt"),
        ('{"prompt": "x", "text": "x"}', "line 1: unknown field 'text'"),
        ('""', "prompt 0: the prompt is empty"),
    ],
)
def test_a_prompt_file_at_fault_is_refused_with_its_line(bundle, tmp_path, content, message):
    (tmp_path / "prompts.jsonl").write_text(content)
    assert message in run("generate", bundle, "--prompts", tmp_path / "prompts.jsonl", code=1).stderr.replace("\n", " ")


def test_stats_name_every_figure(bundle):
    arguments = ("generate", bundle, "--prompt", "In the beginning", "--max-new-tokens", 5)
    printed = run(*arguments, "--stats").stderr
    for name in ("first token", "prompt", "generated", "p50", "p95", "p99", "graph", "sampling", "state", "peak memory"):
        assert name in printed
    stats = generated(*arguments[1:])["stats"]
    assert stats["new_tokens"] == 5
    assert stats["peak_memory_bytes"] > stats["state_bytes"] > 0


@pytest.mark.parametrize("bias", ["5", "x=1", "5=much"])
def test_a_malformed_bias_is_refused(bundle, bias):
    assert "expected ID=BIAS" in run("generate", bundle, "--prompt", "x", "--logit-bias", bias, code=2).stderr


def test_a_bias_bans_a_token(bundle):
    options = ("--prompt", "In the beginning", "--temperature", 0, "--max-new-tokens", 1, "--logprobs", 1)
    best = generated(bundle, *options)["tokens"][0]["id"]
    assert generated(bundle, *options, "--logit-bias", f"{best}=-inf")["tokens"][0]["id"] != best


CHAT = ("--temperature", 0, "--max-new-tokens", 6)


def test_a_chat_works_over_a_pipe(bundle, tmp_path):
    lines = ["Who art thou?", f"/save {tmp_path / 'talk.state'}", "And whence?", "/rewind", "And whence?", "/stats", "/help"]
    result = run("chat", bundle, *CHAT, text="\n".join(lines) + "\n")
    assert "saved to" in result.stderr
    assert "/fork" in result.stderr
    assert "tokens/s" in result.stderr
    loaded = run("chat", bundle, *CHAT, "--load-state", tmp_path / "talk.state", text="And whence?\n").stdout
    assert result.stdout.endswith(loaded + loaded)


def test_a_system_prompt_comes_before_and_reset_comes_back_to_it(bundle, tmp_path):
    (tmp_path / "system.txt").write_text("ROMEO and JULIET.\n")
    text = "Who art thou?\n/reset\nWho art thou?\n"
    with_system = run("chat", bundle, *CHAT, "--system", tmp_path / "system.txt", text=text).stdout
    half = len(with_system) // 2
    assert with_system[:half] == with_system[half:]
    assert with_system != run("chat", bundle, *CHAT, text=text).stdout


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("/nonsense", "no command /nonsense"),
        ("/save", "/save needs a file"),
        ("/load /absent/file", "/absent/file: "),
        ("/rewind", "cannot remove 1 messages: 0 are kept"),
        ("/rewind x", "expected a number"),
        ("/switch 4", "no branch 4"),
    ],
)
def test_a_command_at_fault_ends_a_piped_chat(bundle, line, message):
    assert message in run("chat", bundle, text=line + "\nWho art thou?\n", code=1).stderr.replace("\n", " ")


def test_interrupting_a_reply_keeps_the_conversation(bundle):
    command = [sys.executable, "-c", "from retnet_export.cli import app; app()", "chat", str(bundle), "--max-new-tokens", "100000"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=os.environ) as chat:
        chat.stdin.write(b"Who art thou?\n")
        chat.stdin.flush()
        said = os.read(chat.stdout.fileno(), 1)
        time.sleep(0.2)
        chat.send_signal(signal.SIGINT)
        output, errors = chat.communicate(b"/rewind\n/quit\n", timeout=60)
    assert chat.returncode == 0, errors
    assert said + output
    assert b"back to 0 tokens" in errors


def spoken(command: list[object], after: float = 0.3, signals: int = 1, number: signal.Signals = signal.SIGINT):
    """Start a command, send it a signal once it has printed something, and wait for its end."""
    program = [sys.executable, "-c", "from retnet_export.cli import app; app()", *map(str, command)]
    with subprocess.Popen(program, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=os.environ) as process:
        said = os.read(process.stdout.fileno(), 1)
        time.sleep(after)
        process.send_signal(number)
        output, errors = process.communicate(timeout=60)
    return process.returncode, (said + output).decode(), errors.decode()


def test_interrupting_generate_keeps_the_state_and_the_figures(bundle, tmp_path):
    state = tmp_path / "long.state"
    command = ("generate", bundle, "--prompt", "In the", "--max-new-tokens", 10**6, "--save-state", state, "--stats", "--seed", 1)
    code, text, errors = spoken(command)
    assert code == 130, errors
    assert "tokens/s" in errors
    # What was saved is what was printed.
    after = generated(bundle, "--load-state", state, "--max-new-tokens", 0)
    assert after["text"] == ""
    position = Snapshot.load(state).position
    again = generated(bundle, "--prompt", "In the", "--max-new-tokens", position - 2, "--seed", 1)
    assert again["text"] == text.removesuffix("\n")


def test_sigterm_leaves_nothing_half_written(bundle, tmp_path):
    # The export is held at its first tensor, so that the signal finds it with a folder half made.
    program = (
        "import time, sys; from pathlib import Path; from retnet_export.export import pipeline\n"
        "def held(*a, **k):\n    print('writing', flush=True)\n    time.sleep(60)\n"
        "pipeline._write_graphs = held\nfrom retnet_export.cli import app; app()"
    )
    command = [sys.executable, "-c", program, "export", str(EXAMPLE), "-o", str(tmp_path / "out.retnet")]
    for number, code in ((signal.SIGTERM, 143), (signal.SIGINT, 130)):
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=os.environ) as process:
            assert process.stdout.readline() == b"writing\n"
            assert list(tmp_path.iterdir())
            process.send_signal(number)
            _, errors = process.communicate(timeout=60)
        assert process.returncode == code, errors
        assert b"Traceback" not in errors
        assert list(tmp_path.iterdir()) == []


def test_token_ids_go_in_and_come_out(bundle, tmp_path):
    options = ("--max-new-tokens", 5, "--temperature", 0)
    expected = generated(bundle, "--prompt", "In the beginning", *options)
    ids = json.loads(run("tokenize", bundle, "In the beginning", "--json").stdout)["ids"]
    by_ids = generated(bundle, "--prompt-ids", ", ".join(map(str, ids)), *options)
    assert (by_ids["text"], by_ids["ids"]) == (expected["text"], expected["ids"])
    assert run("generate", bundle, "--prompt-ids", json.dumps(ids), "--ids", *options).stdout.split() == list(
        map(str, by_ids["ids"])
    )
    (tmp_path / "p.jsonl").write_text(json.dumps({"prompt": ids}) + "\n" + json.dumps(ids) + "\n")
    lines = run("generate", bundle, "--prompts", tmp_path / "p.jsonl", *options).stdout.splitlines()
    assert [json.loads(line)["ids"] for line in lines] == [expected["ids"]] * 2


def test_a_bundle_without_a_tokenizer_takes_and_gives_ids(tmp_path):
    tiny.bundle(tmp_path, tiny.config(), chunk=8)
    options = ("--max-new-tokens", 4, "--temperature", 0)
    ids = run("generate", tmp_path / "tiny.retnet", "--prompt-ids", "3 1 4", *options).stdout.split()
    assert len(ids) == 4
    document = generated(tmp_path / "tiny.retnet", "--prompt-ids", "3 1 4", *options, "--logprobs", 1)
    assert list(map(str, document["ids"])) == ids
    assert "has no tokenizer" in run("tokenize", tmp_path / "tiny.retnet", "text", code=1).stderr


def test_a_line_of_prompts_ends_with_a_line_feed_and_nowhere_else(bundle, tmp_path):
    prompts = ["In\u2028the", "To\fbe", "caf\u00e9"]
    text = "\ufeff" + "\r\n".join(prompts)
    (tmp_path / "p.txt").write_bytes(text.encode())
    for source, given in ((tmp_path / "p.txt", None), ("-", text)):
        lines = run("generate", bundle, "--prompts", source, "--max-new-tokens", 1, text=given).stdout.strip("\n").split("\n")
        assert [json.loads(line)["prompt"] for line in lines] == prompts
    (tmp_path / "p.txt").write_bytes("caf\u00e9".encode("latin-1"))
    assert "not UTF-8" in run("generate", bundle, "--prompts", tmp_path / "p.txt", code=1).stderr


def test_a_seed_is_always_told(bundle):
    first = generated(bundle, "--prompt", "In the", "--max-new-tokens", 20)
    assert generated(bundle, "--prompt", "In the", "--max-new-tokens", 20, "--seed", first["seed"])["text"] == first["text"]


def test_a_stop_text_has_its_escapes_read(bundle):
    options = ("--prompt", "KING HENRY:", "--temperature", 0, "--max-new-tokens", 60)
    whole = generated(bundle, *options)["text"]
    assert "\n" in whole[1:]
    stopped = generated(bundle, *options, "--stop", r"\n")
    assert stopped["text"] == whole[: whole.index("\n")]
    assert stopped["finish"] == "stop"


@pytest.mark.parametrize(
    ("written", "meant"),
    [(r"\n\nKING", "\n\nKING"), (r"\\n", r"\n"), (r"\end", r"\end"), (r"a\tb", "a\tb"), (r"\\\n", "\\\n"), ("é", "é")],
)
def test_one_rule_for_escapes(written, meant):
    assert unescaped(written) == meant


def test_options_are_set_and_shown_in_a_chat(bundle, tmp_path):
    state = tmp_path / "talk.state"
    lines = ["/set temperature 0.7", "/set stop \\n", "/set max-new-tokens 3", "/show", "Hi", f"/save {state}", f"/save! {state}"]
    printed = run("chat", bundle, *CHAT, text="\n".join(lines) + "\n").stderr
    for line in ("temperature", "0.7", '["\\n"]', "0 messages"):
        assert line in printed
    assert "already exists; /save! " in run("chat", bundle, text=f"/save {state}\n", code=1).stderr
    for wrong, message in (
        ("/set warmth 1", "unknown option 'warmth'"),
        ("/set top_p x", "expected a number"),
        ("/set top_p 7", "is 7.0, expected more than 0"),
    ):
        assert message in run("chat", bundle, text=wrong + "\n", code=1).stderr.replace("\n", " ")


def test_a_message_of_several_lines_stands_between_quotes(bundle):
    several = run("chat", bundle, *CHAT, "--before", "", text='"""\nTo be,\nor not\n"""\n').stdout
    session = load(bundle).session()
    session.feed("To be,\nor not\n")
    assert several == "".join(session.generate(temperature=0.0, max_new_tokens=6)) + "\n"
    assert "has no end" in run("chat", bundle, text='"""\nTo be', code=1).stderr


def test_a_chat_template_is_used_and_can_be_replaced(bundle, tmp_path):
    pytest.importorskip("jinja2")
    template = tmp_path / "chat.jinja"
    turns = "{% for m in messages %}{{ m.role }}: {{ m.content | trim }}\n{% endfor %}"
    template.write_text(turns + "{% if add_generation_prompt %}assistant:{% endif %}")
    session = load(bundle).session()
    session.feed("user: Who art thou?\nassistant:")
    expected = "".join(session.generate(temperature=0.0, max_new_tokens=6))
    assert run("chat", bundle, *CHAT, "--template", template, text="Who art thou?\n").stdout == expected + "\n"
    assert "cannot be combined with --before" in run("chat", bundle, "--template", template, "--before", "x", code=2).stderr


def test_speculation_gives_the_same_text_and_says_what_came_of_it(bundle):
    prompt = "one two three one two three one two"
    arguments = (bundle, "--prompt", prompt, "--seed", 3, "--temperature", 0.5, "--max-new-tokens", 40)
    off, on = (generated(*arguments, "--speculate", value) for value in ("off", "8"))
    assert on["text"] == off["text"]
    assert off["stats"]["drafted"] == 0 < on["stats"]["drafted"]
    assert on["stats"]["steps"] == 40 - on["stats"]["accepted"]
    assert "guessed ahead" in run("generate", *arguments, "--speculate", 8, "--stats").stderr


def test_a_misspelt_speculation_is_refused(bundle):
    result = run("generate", bundle, "--prompt", "a", "--speculate", "on", code=2)
    assert "--speculate is 'on', expected auto, off, or the most tokens to guess at once" in " ".join(result.output.split())
