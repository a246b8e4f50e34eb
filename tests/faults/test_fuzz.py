"""Whatever is in a file or a reply, a parser takes it or refuses it with the documented error; nothing else happens.

Some hundred inputs each; tests/soak/fuzz.py has the parsers, the files to start from, and the million.
"""

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from soak.fuzz import SEEDS, Parsers, answer, damaged


FEW = settings(max_examples=30, deadline=None, database=None, suppress_health_check=list(HealthCheck))
QUICK = [kind for kind in SEEDS if kind != "YAML config"]
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=9), inner, max_size=4),
)


@pytest.fixture(scope="module")
def parsers(tmp_path_factory):
    return Parsers(tmp_path_factory.mktemp("fuzz"))


@pytest.mark.parametrize("kind", SEEDS)
def test_damaged_files(parsers, kind):
    said = {answer(parsers, kind, damaged(kind, number)) for number in range(120 if kind in QUICK else 10)}
    assert said <= {"accepted", "refused"} and "refused" in said


@pytest.mark.parametrize("kind", [kind for kind in QUICK if kind not in ("manifest", "YAML config")])
def test_whole_files_are_accepted(parsers, kind):
    """So that the parsers above are those that are used; a manifest would need its files."""
    assert {answer(parsers, kind, data) for data in SEEDS[kind]} == {"accepted"}


@pytest.mark.parametrize("kind", QUICK)
def test_any_bytes(parsers, kind):
    @FEW
    @given(st.binary(max_size=200) | st.text(max_size=99).map(lambda text: text.encode("utf-8", "surrogatepass")))
    def check(data):
        assert answer(parsers, kind, data) in ("accepted", "refused")

    check()


@pytest.mark.parametrize("kind", [".jsonl prompts", "journal", "manifest", "trainer state", "optimizer state"])
def test_any_json(parsers, kind):
    """Well-formed, of any structure, also under the keys that the parser looks for."""
    import json

    keys = sorted({*json.loads(SEEDS[kind][0].splitlines()[0]), "step", "micro", "run", "size", "sha256"})
    objects = st.dictionaries(st.sampled_from(keys), JSON, max_size=5) | JSON

    @FEW
    @given(st.lists(objects, max_size=3))
    def check(values):
        assert answer(parsers, kind, "".join(json.dumps(v) + "\n" for v in values).encode()) in ("accepted", "refused")

    check()


def test_any_yaml(parsers):
    @settings(FEW, max_examples=5)
    @given(st.dictionaries(st.sampled_from(["sigma", "reward_funcs", "env", "max_steps", "method"]) | st.text(), JSON))
    def check(values):
        assert answer(parsers, "YAML config", yaml.safe_dump(values).encode()) in ("accepted", "refused")

    check()


ODD_MANIFESTS = {
    "brackets without end": b"[" * 5000,
    "a size without end": b'"size": 1e999}',
    "a null byte in a name": b'"x\\u0000": {"sha256": "", "size": 1}, "',
    "a name that is too long": b'"' + b"x" * 5000 + b'": {"sha256": "", "size": 1}, "',
    "a name out of the folder": b'"a/../../x": {"sha256": "", "size": 1}, "',
}


@pytest.mark.parametrize("kind", ODD_MANIFESTS)
def test_what_fuzzing_found_in_manifests(parsers, kind):
    whole = SEEDS["manifest"][0]
    odd = ODD_MANIFESTS[kind]
    data = odd if odd.startswith(b"[") else whole.replace(b'"size": 12}', odd, 1) if b"1e999" in odd else (
        b"{" + odd + whole[2:]
    )  # fmt: skip
    assert answer(parsers, "manifest", data) == "refused"
