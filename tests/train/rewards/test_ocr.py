"""The reward `ocr`: what a prompt asks for, how a reading is measured, and what PP-OCRv6 reads in rendered pictures."""

import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from ngrpo_train.__main__ import main
from ngrpo_train.prompts import Prompt
from ngrpo_train.recipe.rewards import Ocr
from ngrpo_train.recipe.sections import Reward
from ngrpo_train.rewards import RewardError, Rewards, find_scorer, pp_ocr
from ngrpo_train.rewards.pp_ocr import in_reading_order, kept_steps
from ngrpo_train.rewards.shipped.ocr import Remembering, edits, similarity, wanted_text

from .lettering import lettered
from .servers import serving

CPU = torch.device("cpu")


def reader(**settings):
    return find_scorer("ocr", Ocr(**settings), CPU).read


def read(*pictures, **settings):
    return reader(**settings)(torch.stack(pictures))


# -- What a prompt asks for --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "prompt, row, wanted",
    [
        ('a sign that says "NO ENTRY", at night', {}, "NO ENTRY"),
        ("a sign that says 'No Entry'", {}, "No Entry"),
        ("a sign, “OPEN”, and below it “24 h”", {}, "OPEN 24 h"),
        ("ein Schild „Ausgang“ an der Tür", {}, "Ausgang"),
        ("un panneau «sortie»", {}, "sortie"),
        ("a sign \u2018OPEN\u2019", {}, "OPEN"),
        ("it's a dog's sign: 'don't panic'", {}, "don't panic"),
        ("the cat's 'modern' sign reads \"MEOW\"", {}, "MEOW"),
        ('"A" "B" \'C\'', {}, "A B"),
        ("a blue sign that says LION", {"text": "LION"}, "LION"),
        ('a sign "NO"', {"text": "YES"}, "YES"),
        ('a sign "NO"', {"text": ""}, "NO"),
        ('a sign "NO"', {"text": None, "style": "ink"}, "NO"),
    ],
)
def test_the_text_is_the_rows_or_what_is_in_quotes(prompt, row, wanted):
    assert wanted_text(prompt, row) == wanted


@pytest.mark.parametrize(
    "prompt, row, complaint",
    [
        ("a blue sign that says LION", {}, r'^needs the row\'s field "text", or a text in quotes in the prompt$'),
        ("the dog's and the cat's sign", {"style": "ink"}, r"^needs the row's field"),
        ('an empty sign ""', {}, r"^needs the row's field"),
        ('an empty sign " "', {}, r"^needs the row's field"),
        ('a sign "NO"', {"text": 7}, r'^needs a text in the row\'s field "text", not 7$'),
        ('a sign "NO"', {"text": " "}, r'^needs a text in the row\'s field "text", not \' \'$'),
    ],
)
def test_a_prompt_without_text_is_refused(prompt, row, complaint):
    with pytest.raises(ValueError, match=complaint):
        wanted_text(prompt, row)


LACKING = [
    Prompt('a "cat"', number=1),
    Prompt("a dog", number=2),
    Prompt("b", row={"text": "b"}),
    Prompt("c", number=4),
]


def test_prompts_are_checked_all_at_once():
    rewards = Rewards({"words": Ocr(kind="ocr", layout="line"), "shapes_judge": Reward()})
    rewards.check([LACKING[0], LACKING[2]], "prompts.source", ["words"])
    needs = 'of prompts.source: needs the row\'s field "text", or a text in quotes in the prompt'
    with pytest.raises(ValueError, match="1 more of 4") as raised:
        rewards.check(LACKING, "prompts.source")
    assert str(raised.value) == f"rewards.words cannot score 'a dog' (row 2 of its file) and 1 more of 4 {needs}"
    with pytest.raises(ValueError, match="row 4") as raised:
        rewards.check(LACKING[2:], "prompts.source")
    assert str(raised.value) == f"rewards.words cannot score 'c' (row 4 of its file) {needs}"
    with pytest.raises(ValueError, match=r"shapes_judge cannot score 'b' of .*: not a prompt of the shapes world: 'b'"):
        rewards.check(LACKING[2:3], "prompts.source")


def test_a_scorer_of_ones_own_may_check_prompts(monkeypatch):
    class Rhymes:
        def __call__(self, images, prompts):
            return [0.0] * len(prompts)

        def check(self, prompt, row):
            if "orange" in prompt:
                raise ValueError("needs a word that rhymes")

    monkeypatch.setitem(sys.modules, "rhymes_under_test", SimpleNamespace(rhymes=Rhymes()))
    rewards = Rewards({"rhymes": Reward(path="rhymes_under_test:rhymes")})
    rewards.check([Prompt("a cat")], "evaluation.test")
    with pytest.raises(ValueError, match=r"^rewards\.rhymes cannot score 'an orange' of .*: needs a word"):
        rewards.check([Prompt("a cat"), Prompt("an orange")], "evaluation.test")


def test_ngrpo_eval_refuses_prompts_without_text(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("prompts.txt").write_text("a blue sign that says LION\na sign 'CAT'\n")
    Path("pictures").mkdir()
    Image.new("RGB", (64, 32)).save("pictures/00000_00.png")
    arguments = [
        "eval",
        "--images",
        "pictures",
        "--prompts.source=prompts.txt",
        "--rewards=ocr",
        "--parallel.device=cpu",
    ]
    assert main(arguments) == 2
    assert capsys.readouterr().err == (
        "ngrpo eval: rewards.ocr cannot score 'a blue sign that says LION' (row 1 of its file) of prompts.source: "
        'needs the row\'s field "text", or a text in quotes in the prompt\n'
    )


# -- How a reading is measured -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "one, other, distance",
    [
        ("", "", 0),
        ("abc", "", 3),
        ("", "abc", 3),
        ("CATS", "CATS", 0),
        ("CATS", "CAT", 1),
        ("CTS", "CATS", 1),
        ("CUTS", "CATS", 1),
        ("flaw", "lawn", 2),
        ("kitten", "sitting", 3),
        ("saturday", "sunday", 3),
        ("intention", "execution", 5),
        ("abcd", "dcba", 4),
    ],
)
def test_edits_are_levenshteins_distance(one, other, distance):
    assert edits(one, other) == edits(other, one) == distance


@pytest.mark.parametrize(
    "read, wanted, expected",
    [
        ("cats", "cats", 1.0),
        ("cat", "cats", 0.75),
        ("cuts", "cats", 0.75),
        ("cxts!", "cats", 0.5),
        ("acatsb", "cats", 1.0),  # found inside: no edits are counted
        ("", "cats", 0.0),
        ("something else", "cats", 0.0),  # no worse than nothing
        ("helowrld", "helloworld", 0.8),
    ],
)
def test_similarity_by_hand(read, wanted, expected):
    """Flow-GRPO's rule: 0 edits if the text is found, else at most its length; 1 - edits / length."""
    assert similarity(read, wanted) == pytest.approx(expected)


@pytest.mark.parametrize(
    "settings, expected",
    [
        ({}, [1.0, 1.0, 1 / 3, 1.0, 0.0]),
        ({"measure": "exact"}, [1.0, 1.0, 0.0, 0.0, 0.0]),
        ({"measure": "contains"}, [1.0, 1.0, 0.0, 1.0, 0.0]),
        ({"measure": "edits"}, [0.0, 0.0, -4.0, -2.0, -6.0]),
        ({"measure": "edits", "ignore_case": False}, [0.0, -4.0, -5.0, -6.0, -6.0]),
        ({"measure": "edits", "ignore_spaces": False}, [0.0, -1.0, -5.0, -2.0, -7.0]),
        ({"measure": "exact", "ignore_spaces": False, "ignore_case": False}, [1.0, 0.0, 0.0, 0.0, 0.0]),
    ],
)
def test_measures_of_readings(settings, expected, monkeypatch):
    """By hand: the text has 6 letters, 4 of them small, and a space."""
    scorer = find_scorer("ocr", Ocr(layout="line", **settings), CPU)
    readings = ["No Rats", "NORATS", "NO", "xNO  RATSx", ""]
    monkeypatch.setattr(scorer, "read", lambda images: readings)
    scores = scorer(torch.zeros(5, 3, 1, 1, dtype=torch.uint8), ["a sign 'No  Rats'"] * 5, [{}] * 5)
    assert scores.dtype == torch.float32
    assert scores.tolist() == pytest.approx(expected)


# -- What is read ------------------------------------------------------------------------------------------------------

WORDS = ("LION", "CATS", "MOON", "FISH", "BOOK", "JUMP")


@pytest.mark.parametrize(
    "font, pixels", [("DejaVuSansMono-Bold", 26), ("DejaVuSans-Bold", 20), ("STIXGeneralBol", 24), ("", 22)]
)
@pytest.mark.parametrize("line_width", [64, 0])
def test_words_of_small_pictures_are_read(font, pixels, line_width):
    """32x64 pictures, squeezed to 48x64 or as wide as they are; one colour for each."""
    papers = ("darkred", "darkgreen", "navy", "purple", "black", "teal")
    pictures = [lettered(w, font=font, pixels=pixels, paper=p) for w, p in zip(WORDS, papers, strict=True)]
    assert read(*pictures, layout="line", line_width=line_width) == list(WORDS)


@pytest.mark.parametrize(
    "text, settings",
    [
        ("Grand Opening", {"size": (512, 96), "font": "DejaVuSerif", "pixels": 60, "ink": "black", "paper": "ivory"}),
        ("Hello, World!", {"size": (200, 40), "font": "STIXGeneral", "pixels": 28, "ink": "yellow", "paper": "navy"}),
        ("Exit 24", {"size": (1024, 256), "font": "DejaVuSans", "pixels": 180, "ink": "#909090", "paper": "#303030"}),
    ],
    ids=["serif", "stix", "grey"],
)
def test_lines_of_other_sizes_are_read(text, settings):
    assert read(lettered(text, **settings), layout="line") == [text]


SCENE = lettered(
    ("SALE", (60, 60)),
    ("50% off", (400, 75)),
    ("only today", (100, 500)),
    size=(720, 720),
    font="DejaVuSans",
    pixels=64,
)
SIGN = lettered(("NO ENTRY", (600, 700)), size=(1024, 1024), font="DejaVuSans-Bold", pixels=28, paper="seagreen")


@pytest.mark.parametrize(
    "picture, text",
    [
        (SCENE, "SALE 50% off only today"),
        (SIGN, "NO ENTRY"),
        (lettered("turned by 20", size=(640, 480), font="DejaVuSerif", pixels=56, turned=20), "turned by 20"),
        (lettered("spine", size=(400, 400), font="DejaVuSerif", pixels=64, turned=-90), "spine"),
        (lettered("LION"), "LION"),
        (lettered("a long line in a strip", size=(1200, 40), font="DejaVuSans", pixels=24), "a long line in a strip"),
    ],
    ids=["scene", "small sign", "turned", "spine", "small picture", "strip"],
)
def test_text_is_found_wherever_it_is(picture, text):
    assert read(picture) == [text]


def test_pictures_are_read_as_rapidocr_reads_them():
    """Its own pipeline finds the same boxes, up to the rounding of pixels, and the same text in the same order."""
    from rapidocr import RapidOCR

    params = {"Global.log_level": "error", "Global.use_cls": False}
    theirs = RapidOCR(params=params | {"EngineConfig.onnxruntime.intra_op_num_threads": 1})
    detector = reader().read.detector
    for picture in (SCENE, SIGN):
        found = theirs(picture.permute(1, 2, 0).flip(-1).contiguous().numpy())
        assert read(picture) == [" ".join(found.txts)]
        ours = np.stack(in_reading_order(detector.boxes(picture)))
        np.testing.assert_allclose(ours, found.boxes, atol=4)  # of 720 and 1024; the picture is resized by another rule


def test_rows_are_read_as_in_a_batch():
    """Whatever stands beside a picture, and however many are read at once."""
    lines = torch.stack([lettered(word) for word in WORDS])
    single = reader(layout="line", batch=1)
    assert single(lines) == [text for line in lines for text in single(line[None])] == read(*lines, layout="line")
    both = torch.stack([SCENE, SCENE.flip(1)])
    assert reader(batch=2)(both)[0] == read(SCENE)[0]


@pytest.mark.parametrize("layout", ["line", "free"])
@pytest.mark.parametrize("size", [(1, 1), (2, 5000), (700, 3)], ids=str)
def test_pictures_without_text_give_no_text(size, layout):
    assert read(torch.full((3, *size), 128, dtype=torch.uint8), layout=layout) == [""]


def test_noise_is_not_what_was_asked_for():
    noise = torch.randint(0, 256, (2, 3, 32, 64), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    scores = find_scorer("ocr", Ocr(layout="line"), CPU)(noise, ['"CATS"'] * 2, [{}] * 2)
    assert ((scores >= 0) & (scores <= 0.25)).all()  # a letter by chance
    assert read(noise[0]) == read(torch.zeros(3, 32, 64, dtype=torch.uint8), layout="line") == [""]


def test_ctc_keeps_the_first_of_each_run_and_no_blanks():
    """- A A - A B B - -: the blank parts the two As."""
    classes = np.array([0, 1, 1, 0, 1, 2, 2, 0, 0])
    assert kept_steps(classes).tolist() == [False, True, False, False, True, True, False, False, False]
    recogniser = pp_ocr.Recogniser.__new__(pp_ocr.Recogniser)
    recogniser.characters = ["", "A", "B", " "]
    certainties = np.array([1, 0.5, 0.9, 1, 0.7, 0.6, 0.1, 1, 1])
    assert recogniser._decoded(classes, certainties) == ("AAB", pytest.approx((0.5 + 0.7 + 0.6) / 3))
    assert recogniser._decoded(np.zeros(4, int), np.ones(4)) == ("", 0.0)


def box(x, y, width=40, height=20):
    return np.array([[x, y], [x + width, y], [x + width, y + height], [x, y + height]], np.float32)


def test_boxes_are_read_row_by_row():
    """The second row stands unevenly; a tall box belongs to the row whose middle is within it."""
    boxes = [box(200, 100), box(0, 0), box(90, 107), box(0, 98), box(300, 0, height=30), box(100, 2)]
    order = in_reading_order(boxes)
    assert [tuple(each[0]) for each in order] == [(0, 0), (100, 2), (300, 0), (0, 98), (90, 107), (200, 100)]
    assert in_reading_order([]) == []


# -- Readers that are shared -------------------------------------------------------------------------------------------


def test_rewards_of_a_run_read_each_picture_once(monkeypatch):
    settings = {"ocr": Ocr(layout="line"), "exact": Ocr(kind="ocr", layout="line", measure="exact", log_only=True)}
    rewards = Rewards(settings)
    shared = rewards.scorers["ocr"].read
    assert rewards.scorers["exact"].read is shared
    asked = []
    monkeypatch.setattr(shared, "read", lambda images: asked.append(len(images)) or ["CAT"] * len(images))
    images, prompts = torch.randint(0, 256, (2, 3, 8, 8), dtype=torch.uint8), [Prompt("'CATS'"), Prompt("'cat'")]
    assert rewards.score(images, prompts).tolist() == [[0.75, 1.0], [0.0, 1.0]]
    assert asked == [2]
    images[0, 0, 0, 0] += 1  # the same tensor with another content
    rewards.score(images, prompts)
    rewards.score(images[:1], prompts[:1])
    assert asked == [2, 2, 1]


def test_readings_are_kept_for_a_few_calls():
    asked = []
    remembering = Remembering(lambda images: asked.append(int(images[0, 0, 0, 0])) or ["x"])
    batches = [torch.full((1, 3, 2, 2), i, dtype=torch.uint8) for i in range(40)]
    for batch in (*batches, batches[39], batches[30], batches[0], batches[39].view(1, 3, 1, 4)):
        remembering(batch)
    assert asked == [*range(40), 0, 39]


@pytest.mark.parametrize(
    "settings, same",
    [
        ({"measure": "edits", "ignore_case": False, "weight": 0.5}, True),
        ({"layout": "free"}, False),
        ({"line_width": 64}, False),
        ({"batch": 8}, False),
    ],
)
def test_readers_are_shared_where_they_read_alike(settings, same):
    assert (reader(layout="line") is reader(**{"layout": "line", **settings})) is same


def test_a_server_and_this_process_agree():
    settings = {"ocr": Ocr(layout="line"), "exact": Ocr(kind="ocr", layout="line", measure="exact")}
    images = torch.stack([lettered("CATS"), lettered("CUTS"), lettered("LION")])
    prompts = [Prompt("a red sign that says CATS", row={"text": "CATS"}), Prompt("'CATS'"), Prompt('a "DOG"')]
    here = Rewards(settings).score(images, prompts)
    assert here.tolist() == [[1.0, 0.75, 0.0], [1.0, 0.0, 0.0]]
    with serving(settings) as url:
        remote = {"ocr": Ocr(remote=url), "exact": Ocr(kind="ocr", remote=url, batch=2)}
        rewards = Rewards(remote)
        assert torch.equal(rewards.score(images, prompts), here)
        with pytest.raises(ValueError, match=r"^rewards\.ocr cannot score 'a dog' of .*: needs the row's field "):
            rewards.check([Prompt("a dog")], "prompts.source")
        with pytest.raises(RewardError, match=r"failed on 'a dog', with no fields: ValueError: needs the row's field"):
            Rewards({"ocr": Ocr(remote=url)}).score(images[:1], [Prompt("a dog")])


# -- What is missing or does not go together ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings, complaint",
    [
        ({"dtype": "bfloat16"}, r"dtype = 'bfloat16' is not for this reward"),
        ({"offload": True}, r"offload = True is not for this reward"),
        ({"backend": "hpsv2"}, r"backend = 'hpsv2' is not for this reward"),
        ({"processor": "a"}, r"processor = 'a' is not for this reward"),
        ({"line_width": 64, "layout": "line", "reader": "tesseract"}, r"line_width = 64 is for layout = "),
        ({"line_width": 64}, r'line_width = 64 is for layout = "line" and reader = "pp_ocr"'),
        ({"path": "nowhere.onnx"}, r"nowhere\.onnx cannot be read as an ONNX model: "),
        ({"path": str(pp_ocr.shipped_file(pp_ocr.DETECTOR))}, r".* is no recogniser of PP-OCR: 0 characters for "),
    ],
)
def test_settings_that_cannot_be_used(settings, complaint):
    with pytest.raises(ValueError, match=rf"^rewards\.ocr: {complaint}") as raised:
        find_scorer("ocr", Ocr(**settings), CPU)
    assert "\n" not in str(raised.value)


def test_another_recogniser_can_be_given():
    file = str(pp_ocr.shipped_file(pp_ocr.RECOGNISER))
    assert read(lettered("CATS"), layout="line", path=file) == ["CATS"]


def test_missing_packages_are_named_with_the_command(monkeypatch):
    def find(package):
        needs = rf'^rewards\.ocr: needs the package {package}: pip install "ngrpo\[ocr\]"$'
        with pytest.raises(ValueError, match=needs):
            find_scorer("ocr", Ocr(batch=7), CPU)  # of its own, so that no reader is there

    with monkeypatch.context() as patch:
        patch.setattr(pp_ocr, "find_spec", lambda name: None)
        find("rapidocr")
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "onnxruntime", None)
        find("onnxruntime")


def test_a_version_of_rapidocr_with_other_weights(monkeypatch, tmp_path):
    monkeypatch.setattr(pp_ocr, "find_spec", lambda name: SimpleNamespace(submodule_search_locations=[str(tmp_path)]))
    with pytest.raises(ValueError, match=r"^rewards\.ocr: this version of the package rapidocr ships no PP-OCRv6_rec"):
        find_scorer("ocr", Ocr(batch=7), CPU)


@pytest.mark.parametrize(
    "device, offered, chosen",
    [
        ("cpu", ["CUDAExecutionProvider", "CPUExecutionProvider"], [None]),
        ("cuda:1", ["CPUExecutionProvider"], [None]),
        ("cuda:1", ["CUDAExecutionProvider", "CPUExecutionProvider"], [1, None]),
    ],
)
def test_sessions_are_on_the_runs_device_where_the_package_can(device, offered, chosen, monkeypatch):
    made = []

    class Options:
        def add_session_config_entry(self, name, value):
            setattr(self, name, value)

    fake = SimpleNamespace(
        SessionOptions=Options,
        get_available_providers=lambda: offered,
        InferenceSession=lambda file, options, providers: made.append((options, providers)),
    )
    monkeypatch.setitem(sys.modules, "onnxruntime", fake)
    pp_ocr.session(Path("a.onnx"), torch.device(device))
    [(options, providers)] = made
    assert [None if isinstance(each, str) else each[1]["device_id"] for each in providers] == chosen
    assert options.intra_op_num_threads == torch.get_num_threads()
    assert getattr(options, "session.intra_op.allow_spinning") == "0"
