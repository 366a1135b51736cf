"""Records of prompts: joined with padding and masks, picked by rows, kept apart where prompts have no axis."""

import pytest
import torch
from torch import Tensor

from ngrpo_train.models.recorded import Form, Own, Recorded

LENGTHS = {"": 2, "ab": 3, "abcd": 5}


def calls(texts: list[str], picture: float = 0.0) -> list[tuple[str, object]]:
    """What a pipeline might prepare: padded features, a mask unless all are of a length, positions, ragged lists."""
    lengths = [LENGTHS[text] for text in texts]
    longest = max(lengths)
    features = torch.zeros(len(texts), longest, 4)
    mask = torch.zeros(len(texts), longest, dtype=torch.int64)
    for row, length in enumerate(lengths):
        features[row, :length] = torch.arange(1, length + 1)[:, None] + 10.0 * length
        mask[row, :length] = 1
    ragged = [torch.full((length,), float(length)) for length in lengths]
    same = None if mask.all() else mask
    return [
        ("encode_prompt", (features, same)),
        ("encode_image", torch.full((1, 7), picture)),  # for all prompts of a call
        ("prepare_latents", (torch.arange(6.0).view(3, 2), ragged)),
    ]


@pytest.fixture
def form() -> Form:
    return Form.of(calls([""]), calls(["", ""]), calls(["", "abcd"]))


def values_of(record: Recorded) -> tuple[Tensor, Tensor | None, object, Tensor, list[Tensor]]:
    (_, (features, mask)), (_, image), (_, (positions, ragged)) = record.calls()
    return features, mask, image, positions, ragged


@pytest.mark.parametrize("form_again", [False, True], ids=["learned", "stored"])
def test_joined_records_are_what_one_call_gives(form: Form, form_again: bool) -> None:
    form = Form.loads(form.dumps()) if form_again else form
    joined = Recorded.cat([form.record(calls([text])) for text in ("ab", "abcd", "")])
    features, mask, _, positions, ragged = values_of(joined)
    expected = values_of(form.record(calls(["ab", "abcd", ""])))
    assert torch.equal(features, expected[0])
    assert mask is not None
    assert expected[1] is not None
    assert torch.equal(mask, expected[1])
    assert mask.dtype == torch.int64
    assert torch.equal(positions, expected[3])
    assert [each.tolist() for each in ragged] == [each.tolist() for each in expected[4]]


def test_records_of_one_length_have_no_mask_and_joining_joined_ones_makes_it(form: Form) -> None:
    two = Recorded.cat([form.record(calls(["ab"])), form.record(calls(["ab"]))])
    assert values_of(two)[1] is None
    three = Recorded.cat([two, form.record(calls(["abcd"]))])
    mask = values_of(three)[1]
    assert mask is not None
    assert mask.sum(1).tolist() == [3, 3, 5]
    assert three.count == 3


def test_rows_are_picked_and_repeated(form: Form) -> None:
    joined = Recorded.cat([form.record(calls([text])) for text in ("ab", "abcd")])
    picked = joined.rows(torch.tensor([1, 0, 1]))
    features, mask, _, positions, ragged = values_of(picked)
    whole = values_of(joined)
    assert torch.equal(features, whole[0][[1, 0, 1]])
    assert mask is not None
    assert mask.sum(1).tolist() == [5, 3, 5]
    assert [len(each) for each in ragged] == [5, 3, 5]
    assert torch.equal(positions, whole[3]), "what has no axis is for all"
    assert picked.unlike() == []


def test_what_prompts_have_for_themselves_keeps_them_apart(form: Form) -> None:
    records = [form.record(calls(["ab"], picture)) for picture in (1.0, 2.0, 1.0)]
    joined = Recorded.cat(records)
    assert isinstance(joined.values[2], Own)
    assert len(set(joined.unlike())) == 3, "each record's own, though two are equal"
    assert float(values_of(joined.rows(torch.tensor([1])))[2].mean()) == 2
    assert len(set(joined.rows(torch.tensor([0, 0])).unlike())) == 1
    alike = Recorded.cat([records[0], records[2]])
    assert alike.unlike() == [], "equal pictures are for all"
    twice = Recorded.cat([alike, records[1]])  # one value stands for the two rows of `alike`
    assert len(twice.unlike()) == 3


def test_prompts_of_a_pipeline_that_takes_one_at_a_time_are_kept_apart() -> None:
    form = Form.of_single(calls([""]))
    joined = Recorded.cat([form.record(calls([text])) for text in ("ab", "abcd", "ab")])
    first, second, _ = joined.unlike()
    assert first != second
    for row, text in enumerate(("ab", "abcd")):
        features, mask, _, positions, ragged = values_of(joined.rows(torch.tensor([row, row])))
        expected = values_of(form.record(calls([text])))
        assert torch.equal(features, expected[0].expand(2, -1, -1))
        assert mask is None
        assert torch.equal(positions, expected[3])
        assert [len(each) for each in ragged] == [LENGTHS[text]] * 2


def test_another_form_is_refused(form: Form) -> None:
    with pytest.raises(ValueError, match="prepares this prompt by other calls"):
        form.record(calls([""])[:2])


def test_the_tensors_of_a_prompt_are_its_record() -> None:
    form = Form.loads(Form.of(calls([""]), calls(["", ""]), calls(["", "abcd"])).dumps())
    stored = form.record(calls(["ab"], picture=2.0)).tensors()
    assert stored.keys() == {"0", "2", "3", "4.0"}, "no mask, and a list's one entry"
    features, mask, image, positions, ragged = values_of(form.of_tensors(stored))
    expected = values_of(form.record(calls(["ab"], picture=2.0)))
    assert torch.equal(features, expected[0])
    assert mask is None
    assert torch.equal(image, expected[2])
    assert torch.equal(positions, expected[3])
    assert torch.equal(ragged[0], expected[4][0])
    assert len(ragged) == 1


@pytest.mark.parametrize(
    "learned, value",
    [(3, 4), ([torch.ones(1)], ["a word"]), (torch.device("cpu"), torch.device("cpu"))],
    ids=["a number that is not the same", "a list of words", "an object"],
)
def test_what_cannot_be_stored_is_refused(learned: object, value: object) -> None:
    def call(given: object) -> list[tuple[str, object]]:
        return [("encode_prompt", {"given": given})]

    form = Form.of(call(learned), call(learned), call(learned))
    with pytest.raises(ValueError, match=r"which cannot be stored$"):
        form.record(call(value)).tensors()
