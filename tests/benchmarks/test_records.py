"""Rows with provenance: written once, never repeated under the same protocol, preferred to older ones."""

import json
import re

import records
import studies


def test_a_row_says_where_it_comes_from(tmp_path):
    path = tmp_path / "some" / "rows.jsonl"
    row = records.append(path, 3, {"model": "m", "perplexity": 2.5})
    assert records.read(path) == [row]
    made = row["provenance"]
    assert re.fullmatch(r"[0-9a-f]{40}", made["commit"]) and isinstance(made["clean"], bool)
    assert made["packages"].keys() >= {"torch", "transformers"} and made["processor"] and made["cores"] > 0
    assert made["date"].endswith("+00:00") and made["command"].startswith("python ")


def test_the_command_has_no_folders_of_the_machine(monkeypatch):
    script = str(records.ROOT / "benchmarks" / "methods.py")
    monkeypatch.setattr("sys.argv", [script, "--results", "/home/someone/rows.jsonl", "--methods", "CRePE + pcg"])
    command = records.provenance.__wrapped__()["command"]
    assert command == "python benchmarks/methods.py --results rows.jsonl --methods 'CRePE + pcg'"


def test_a_run_is_done_under_its_own_protocol_and_recipe_only():
    key = {"model": "m", "seed": 0, "recipe": {"CRePEModifier": {"row": 1.0}}}
    row = {"protocol": 2, **key, "perplexity": 1.0}
    assert records.is_done(key, [row], 2)
    assert not records.is_done(key, [row], 3)
    assert not records.is_done(key | {"recipe": {"CRePEModifier": {"row": 2.0}}}, [row], 2)
    assert not records.is_done(key, [{**key, "perplexity": 1.0}], 2), "a row without a protocol"


def test_the_newest_rows_win_and_old_ones_fill_in():
    first, second = {"seed": 0, "recipe": "a"}, {"seed": 1, "recipe": "a"}
    old = [{"seed": 0, "perplexity": 1}, {"seed": 1, "perplexity": 2}, {"seed": 1, "perplexity": 3}]
    rows = [{"protocol": 2, **first, "perplexity": 4}]
    assert [row["perplexity"] for row in records.newest([first, second], rows, old, 2)] == [4, 3]


def test_old_rows_fill_in_cells_that_have_no_row_of_this_protocol_and_are_marked():
    old = [{"kind": "a", "turn": 1}, {"kind": "b", "turn": 1}, {"kind": "b", "turn": 2}]
    rows = [
        {"protocol": 2, "kind": "a", "turn": 3, "provenance": {}},
        {"protocol": 1, "kind": "b", "turn": 4, "provenance": {}},
    ]
    found = records.with_old(rows, old, 2, ["kind"])
    assert [row["turn"] for row in found] == [1, 2, 3]
    assert records.dagger(row for row in found if row["kind"] == "b") == "†"
    assert records.dagger(row for row in found if row["kind"] == "a") == ""


def test_old_rows_are_there_and_have_no_provenance():
    rows = records.read_old(records.RESULTS / "methods.jsonl")
    assert len(rows) > 500 and not any("provenance" in row or "protocol" in row for row in rows)


def test_studies_are_packed_the_same_each_time_and_come_back(tmp_path, monkeypatch):
    folder = tmp_path / "studies"
    for name in ("b/two.json", "a/one.json"):
        (folder / name).parent.mkdir(parents=True)
        (folder / name).write_text(json.dumps({"name": name}))
    one, other = tmp_path / "one.tar.xz", tmp_path / "other.tar.xz"
    assert studies.pack_studies(folder, one) == studies.pack_studies(folder, other) == 2
    assert one.read_bytes() == other.read_bytes()
    monkeypatch.setattr(studies, "ARCHIVE", one)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    unpacked = studies.studies_folder()
    assert json.loads((unpacked / "a" / "one.json").read_text()) == {"name": "a/one.json"}
    (unpacked / "a" / "one.json").write_text("mine")
    assert (studies.studies_folder() / "a" / "one.json").read_text() == "mine", "what is there is left as it is"
