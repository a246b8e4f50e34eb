"""
As fuzz.py, with inputs that are made by which branches of a parser they reach (atheris, an option: it is not among the
project's dependencies).

    pip install atheris
    python tests/soak/fuzz_coverage.py "journal" --inputs 100000
    python tests/soak/fuzz_coverage.py "YAML config" ".jsonl prompts" --seconds 600

One process per kind of input. Ends with exit code 0 if every answer was one of the documented ones; otherwise atheris
prints the input and its traceback.
"""

import argparse
import importlib
import inspect
import logging
import subprocess
import sys
import tempfile
from pathlib import Path


sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

PARSERS = ["es_trl.cli.arguments", "es_trl.data.prompt_files", "es_trl.run.checkpoint", "es_trl.run.journal",
           "es_trl.replay.replay", "es_trl.rewards.endpoint", "es_trl.rewards.remote", "yaml.reader", "yaml.scanner",
           "yaml.parser", "yaml.composer", "yaml.constructor", "yaml.resolver", "json.decoder"]  # fmt: skip


def instrument(module) -> None:
    """Makes the functions and methods of a module tell atheris which way they go."""
    import atheris

    for thing in vars(module).values():
        inside = vars(thing).values() if inspect.isclass(thing) and thing.__module__ == module.__name__ else [thing]
        for function in inside:
            if inspect.isfunction(function) and function.__module__ == module.__name__:
                atheris.instrument_func(function)


def fuzz(kind: str, inputs: int, seconds: int) -> None:
    """Does not return: libFuzzer ends the process."""
    import atheris
    from fuzz import SEEDS, Parsers, answer

    for name in PARSERS:
        instrument(importlib.import_module(name))
    logging.disable(logging.CRITICAL)
    folder = Path(tempfile.mkdtemp(prefix="es_trl-coverage-"))
    (folder / "corpus").mkdir()
    for number, data in enumerate(SEEDS[kind]):
        (folder / "corpus" / str(number)).write_bytes(data)
    parsers = Parsers(folder)

    def one(data: bytes) -> None:
        said = answer(parsers, kind, data)
        if said not in ("accepted", "refused"):
            raise AssertionError(f"{kind}: {said}")

    limits = [f"-runs={inputs}", f"-max_total_time={seconds}", "-max_len=4096", "-print_final_stats=1"]
    atheris.Setup([sys.argv[0], *limits, f"-artifact_prefix={folder}/", str(folder / "corpus")], one)
    atheris.Fuzz()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kinds", nargs="+", help='kinds of input, as in fuzz.py: "journal", "YAML config", ...')
    parser.add_argument("--inputs", type=int, default=-1, help="inputs per kind; -1 is no limit")
    parser.add_argument("--seconds", type=int, default=300, help="per kind; 0 is no limit")
    arguments = parser.parse_args()
    if len(arguments.kinds) == 1:
        fuzz(arguments.kinds[0], arguments.inputs, arguments.seconds)
    limits = ["--inputs", str(arguments.inputs), "--seconds", str(arguments.seconds)]
    codes = [subprocess.run([sys.executable, __file__, kind, *limits]).returncode for kind in arguments.kinds]
    sys.exit(int(any(codes)))


if __name__ == "__main__":
    main()
