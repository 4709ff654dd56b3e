"""`retnet-export doctor`."""

from __future__ import annotations

from retnet_export.commands.common import Json, print_json, print_table


def doctor(as_json: Json = False) -> None:
    """Say what works on this machine and, where something does not, the command that would mend it."""
    from retnet_export.runtime.device.doctor import examine

    report = examine()
    if as_json:
        print_json(report)
        return
    print_table("machine", [(name, str(value)) for name, value in report["machine"].items()])
    for title, facts in (("GPU", report["gpu"]), ("Jetson", report["jetson"])):
        if facts:
            print_table(f"\n{title}", list(facts.items()))
    print_table("\npackages", [(name, str(value)) for name, value in report["packages"].items()])
    print_table("\nwhat works", [(name, "yes" if mend is None else f"no: {mend}") for name, mend in report["works"].items()])
