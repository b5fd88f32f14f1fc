"""Coverage-guided fuzzing of what reads masks and relevance, by atheris: `nox -s fuzz`.

    python tests/fuzz/fuzz_tensors.py -runs=100000

The first byte of an input says how the rest is read: as a mask or relevance, .pt or .safetensors. The seeds are real
files of each. Anything but an `InputError` ends the run with the input that caused it.
"""

import sys
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory

import atheris

with atheris.instrument_imports(include=["stereoclinic", "json", "zipfile", "pickletools"]):
    from tests.fuzz.samples import TENSORS

    from stereoclinic.errors import InputError

CASES = [(read, write, ending) for write, read in TENSORS.values() for ending in (".pt", ".safetensors")]


def main() -> None:
    with TemporaryDirectory() as name:
        folder = Path(name)
        corpus = folder / "corpus"
        corpus.mkdir()
        for i, (_, write, ending) in enumerate(CASES):
            write(folder / f"whole{ending}")
            (corpus / str(i)).write_bytes(bytes([i]) + (folder / f"whole{ending}").read_bytes())

        def read_one(content: bytes) -> None:
            read, _, ending = CASES[content[0] % len(CASES) if content else 0]
            path = folder / f"one{ending}"
            path.write_bytes(content[1:])
            with suppress(InputError):
                read(path)

        atheris.Setup([*sys.argv, str(corpus)], read_one)
        atheris.Fuzz()


if __name__ == "__main__":
    main()
