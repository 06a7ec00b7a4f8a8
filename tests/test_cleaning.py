"""What cleaning leaves and drops: personal data, near duplicates, filters."""

import pytest
from raw_text import needs_datatrove, run, story, texts_of, write

from lm_jax.prepare import clean, readers

PERSONAL = [
    "jane.doe+news@mail.example.net", "ROOT@sub.domain.co.uk", "203.0.113.77", "10.1.2.3", "8.8.8.8",
    "2001:db8:85a3::8a2e:370:7334", "fe80::1ff:fe23:4567:890a", "+1 415-555-2671", "(020) 7946 0958", "415-555-2671",
    "+442079460958",
]  # fmt: skip


@needs_datatrove
def test_planted_personal_data_does_not_survive(tmp_path):
    texts = [f"{story(n, 2)} Write to {secret}, or call. It is {secret}." for n, secret in enumerate(PERSONAL)]
    innocent = "Version 3.11.7 of 2026-11-24, at 12:30:45, cost 1,234.50; see a::b, std::vector and 127 others."
    write(tmp_path / "x.jsonl", [*texts, innocent])
    run(tmp_path, "x.jsonl", scrub=True)
    found = texts_of(tmp_path / "out")
    assert len(found) == len(texts) + 1 and innocent in found
    assert not [secret for secret in PERSONAL if any(secret in text for text in found)]
    assert any(clean.EMAIL in text for text in found) and any(clean.ADDRESS in text for text in found)


@needs_datatrove
def test_of_near_duplicates_one_stays(tmp_path):
    texts = [story(seed, 30) for seed in range(25)]
    nearly = [text + " The end." for text in texts[:5]]
    write(tmp_path / "x.jsonl", [*texts, *nearly])
    told = run(tmp_path, "x.jsonl", duplicates="minhash")
    found = texts_of(tmp_path / "out")
    assert told["out"]["documents"] == len(found) == 25
    assert told["near_duplicates"]["clusters"] == 5 and told["near_duplicates"]["documents"] == 10
    assert told["stages"][2]["dropped"]["near-duplicate"]["documents"] == 5
    for text, other in zip(texts, nearly, strict=False):
        assert (text in found) + (other in found) == 1
    assert all(text in found for text in texts[5:])


@needs_datatrove
def test_filters_leave_prose_and_name_the_rule_that_drops(tmp_path):
    good = [story(seed, 30) for seed in range(10)]
    bad = [
        "buy now " * 200,
        "lorem ipsum dolor sit amet, and so on and on.\n" * 9,
        "- a\n- b\n" * 50,
        "x",
        "{" + good[0],
    ]
    write(tmp_path / "x.jsonl", [*good, *bad])
    told = run(tmp_path, "x.jsonl", filters=("gopher", "c4", "fineweb"))
    dropped = {reason for reason in told["stages"][0]["dropped"]}
    assert told["out"]["documents"] == 10 and told["in"]["documents"] == 15
    assert any(reason.startswith("gopher: ") for reason in dropped) and "c4: curly_bracket" in dropped
    assert sorted(texts_of(tmp_path / "out")) == sorted(good)


@needs_datatrove
@pytest.mark.parametrize(
    "text", ["", " ", "。", "\u200b", "!!!", "a", "- ", "\n\n\n", "…" * 40, "中文" * 99, "\x1b[0m"]
)
def test_no_text_upsets_a_block(text):
    dropped = []
    writer = type(
        "Writer",
        (),
        {"__enter__": lambda s: s, "__exit__": lambda s, *_: None, "write": lambda s, d, r: dropped.append(d)},
    )
    blocks = clean.filters(clean.FILTERS, lambda rule: writer()) + clean.scrubbers()
    data = iter([readers.Document(text + "x", "name")])
    for block in blocks:
        data = block(data, 0, 1)
    assert len(list(data)) + len(dropped) == 1
