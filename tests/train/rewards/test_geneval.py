"""The reward `geneval`: rows, GenEval's rules in cases worked out by hand, colours, and scores of pictures."""

import json

import pytest
import torch
from PIL import Image
from torch.nn import functional
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel

from ngrpo_train.prompts import Prompt
from ngrpo_train.prompts.files import read_prompts
from ngrpo_train.recipe.rewards import Geneval
from ngrpo_train.recipe.sections import Reward
from ngrpo_train.rewards import Rewards, find_scorer
from ngrpo_train.rewards.geneval_rules import CLASSES, COLORS, Clause, Seen, checks, relations, wanted_objects
from ngrpo_train.rewards.mask2former import Found
from ngrpo_train.rewards.shipped.geneval import crop
from ngrpo_train.shapes.pipeline import clip_tokenizer

from .detectors import save_detector

CPU = torch.device("cpu")

# Rows of GenEval's form, one of each kind.
ROWS = [
    {"tag": "single_object", "include": [{"class": "bench", "count": 1}], "prompt": "a photo of a bench"},
    {
        "tag": "counting",
        "include": [{"class": "clock", "count": 2}],
        "exclude": [{"class": "clock", "count": 3}],
        "prompt": "a photo of two clocks",
    },
    {"tag": "colors", "include": [{"class": "car", "count": 1, "color": "pink"}], "prompt": "a photo of a pink car"},
    {
        "tag": "position",
        "include": [{"class": "teddy bear", "count": 1}, {"class": "dog", "count": 1, "position": ["right of", 0]}],
        "prompt": "a photo of a dog right of a teddy bear",
    },
    {
        "tag": "color_attr",
        "include": [{"class": "cup", "count": 1, "color": "red"}, {"class": "tv remote", "count": 1, "color": "blue"}],
        "prompt": "a photo of a red cup and a blue tv remote",
    },
]


@pytest.fixture(scope="module")
def detector(tmp_path_factory):
    directory = tmp_path_factory.mktemp("detector")
    with pytest.MonkeyPatch.context() as monkeypatch:
        save_detector(directory, monkeypatch)
    return directory


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """A CLIP as transformers saves it, whose colours differ."""
    directory, vocabulary = tmp_path_factory.mktemp("clip"), clip_tokenizer()
    sizes = {"num_hidden_layers": 2, "num_attention_heads": 2, "hidden_size": 32, "intermediate_size": 64}
    ends = {f"{name}_token_id": getattr(vocabulary, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    config = CLIPConfig(
        projection_dim=24,
        vision_config={**sizes, "image_size": 12, "patch_size": 4},
        text_config={**sizes, **ends, "vocab_size": len(vocabulary), "max_position_embeddings": 64},
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = CLIPModel(config)
        for module in model.modules():
            if isinstance(module, torch.nn.Linear):
                module.weight.data = 1.5 * module.in_features**-0.5 * torch.randn_like(module.weight)
            elif isinstance(module, torch.nn.Embedding):
                module.weight.data = torch.randn_like(module.weight)
            elif isinstance(module, torch.nn.Conv2d):
                module.weight.data = 0.6 * torch.randn_like(module.weight)
    model.save_pretrained(directory)
    vocabulary.save_pretrained(directory)
    return directory


@pytest.fixture
def load(detector, clip):
    def load(**settings):
        settings = {"path": str(detector), "processor": str(clip)} | settings
        scorer = find_scorer("geneval", Geneval(**settings), CPU)
        scorer.detector.edges = (64, 106)
        return scorer

    return load


# -- Rows --------------------------------------------------------------------------------------------------------------


def test_genevals_own_lines_are_prompts(tmp_path):
    (tmp_path / "evaluation_metadata.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
    prompts = read_prompts(tmp_path / "evaluation_metadata.jsonl")
    assert [prompt.text for prompt in prompts] == [row["prompt"] for row in ROWS]
    single, counting, colored, placed, both = (wanted_objects(prompt.text, prompt.row) for prompt in prompts)
    assert single.include == (Clause(name="bench", count=1),)
    assert (single.exclude, single.least) == ((), 0.3)
    assert counting.exclude == (Clause(name="clock", count=3),)
    assert counting.least == 0.9
    assert colored.include == (Clause(name="car", count=1, color="pink"),)
    assert placed.include[1] == Clause(name="dog", count=1, relation="right of", target=0)
    assert [clause.color for clause in both.include] == ["red", "blue"]


def test_a_row_without_a_tag_is_one():
    assert wanted_objects("", {"include": [{"class": "dog", "count": 16}], "exclude": None}).least == 0.3


DOG = {"class": "dog", "count": 1}


@pytest.mark.parametrize(
    "row, complaint",
    [
        ({}, 'needs the row\'s field "include", a list such as [{"class": "dog", "count": 2}]'),
        ({"include": [], "exclude": [DOG]}, 'needs the row\'s field "include", a list such as'),
        ({"include": "dog"}, "needs a list in the row's field \"include\", not 'dog'"),
        ({"include": [DOG], "exclude": DOG}, 'needs a list in the row\'s field "exclude", not {'),
        ({"include": ["dog"]}, "needs an object with a class and a count in the row's include[0], not 'dog'"),
        (
            {"include": [DOG, {"class": "dgo", "count": 1}]},
            "needs one of COCO's 80 classes by GenEval's names in the row's include[1].class, not 'dgo'; did you mean "
            "dog?",
        ),
        ({"include": [{"class": "mouse", "count": 1}]}, "include[0].class, not 'mouse'; did you mean"),
        ({"include": [{"count": 1}]}, "include[0].class, not None"),
        ({"include": [{"class": ["dog"], "count": 1}]}, "include[0].class, not ['dog']"),
        ({"include": [{"class": "dog"}]}, "needs a count from 1 to 16 in the row's include[0].count, not None"),
        ({"include": [DOG | {"count": 0}]}, "include[0].count, not 0"),
        ({"include": [DOG | {"count": True}]}, "include[0].count, not True"),
        ({"include": [DOG], "exclude": [DOG | {"count": 17}]}, "exclude[0].count, not 17"),
        (
            {"include": [DOG | {"color": "grey"}]},
            "needs one of red, orange, yellow, green, blue, purple, pink, brown, black, white in the row's "
            "include[0].color, not 'grey'; did you mean green?",
        ),
        (
            {"include": [DOG | {"colour": "red"}]},
            "needs only class, count, color, position in the row's include[0], not colour",
        ),
        ({"include": [DOG], "exclude": [DOG | {"color": "red"}]}, "needs only class, count in the row's exclude[0], n"),
        (
            {"include": [DOG, DOG | {"position": ["left", 0]}]},
            "needs one of left of, right of, above, below in the row's include[1].position, not 'left'; did you mean "
            "left of?",
        ),
        ({"include": [DOG, DOG | {"position": "left of"}]}, 'needs a list such as ["left of", 0] in the row\'s includ'),
        (
            {"include": [DOG, DOG | {"position": ["above", 1]}]},
            "needs the index of a clause before it in the row's include[1].position, not 1",
        ),
        ({"include": [DOG | {"position": ["above", 0]}]}, "include[0].position, not 0"),
        ({"include": [DOG, DOG | {"position": ["above", -1]}]}, "include[1].position, not -1"),
    ],
    ids=str,
)
def test_other_rows_are_refused_by_field(row, complaint):
    with pytest.raises(ValueError) as error:  # noqa: PT011
        wanted_objects("a prompt", row)
    assert complaint in str(error.value)
    assert str(error.value).startswith("needs ")
    assert "\n" not in str(error.value)


def test_prompts_are_refused_before_any_work(detector, clip):
    rewards = Rewards({"objects": Geneval(kind="geneval", path=str(detector), processor=str(clip))})
    good = Prompt("a dog", row={"include": [DOG]}, number=1)
    rewards.check([good], "prompts.source")
    refused = r"^rewards\.objects cannot score 'a dgo' \(row 2 of its file\) of prompts\.source: needs one .* 'dgo'"
    with pytest.raises(ValueError, match=refused):
        rewards.check([good, Prompt("a dgo", row={"include": [DOG | {"class": "dgo"}]}, number=2)], "prompts.source")


# -- Rules -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "box, other, expected",
    [
        # 10 x 10 each: a distance of 20 across, of which 0.1 * (10 + 10) = 2 are taken off. 18 / 20 > 0.5.
        ((20, 0, 30, 10), (0, 0, 10, 10), {"right of"}),
        ((0, 0, 10, 10), (20, 0, 30, 10), {"left of"}),
        ((0, 20, 10, 30), (0, 0, 10, 10), {"below"}),
        ((0, 0, 10, 10), (0, 20, 10, 30), {"above"}),
        ((20, 20, 30, 30), (0, 0, 10, 10), {"right of", "below"}),  # 18 / 28.3 = 0.64 on both axes
        ((30, 20, 40, 30), (0, 0, 10, 10), {"right of"}),  # 28 / 36.1, and down 18 / 36.1 = 0.499
        ((2, 0, 12, 10), (0, 0, 10, 10), set()),  # a distance of 2 is nothing
        ((4, 0, 14, 10), (0, 0, 10, 10), set()),  # 2 / 4 is not more than a half
        ((5, 0, 15, 10), (0, 0, 10, 10), {"right of"}),  # 3 / 5
        ((0, 0, 10, 10), (0, 0, 10, 10), set()),
        # Sizes count on their axis: 100 wide, 10 high. 40 across less 0.1 * 110 = 29, of 40.
        ((0, 0, 100, 10), (85, 0, 95, 10), {"left of"}),
        ((40, 0, 140, 10), (85, 0, 95, 10), set()),  # centres at the same place
        ((0, 0, 100, 10), (60, 14, 70, 24), {"above"}),  # 15 - 11 = 4 across and 14 - 2 = 12 down, of 20.5
    ],
)
def test_relations_by_hand(box, other, expected):
    assert relations(box, other) == expected


def wanted(*include, exclude=()):
    return wanted_objects("", {"include": list(include), "exclude": list(exclude)})


LEFT, RIGHT = (0, 0, 10, 10), (50, 0, 60, 10)


def red(*boxes):
    return [Seen(box, "red") for box in boxes]


@pytest.mark.parametrize(
    "asked, seen, expected",
    [
        (wanted(DOG), {"dog": red(LEFT)}, [True]),
        (wanted(DOG), {"cat": red(LEFT)}, [False]),
        (wanted(DOG), {"dog": red(LEFT, RIGHT)}, [True]),  # more are no fault
        (wanted(DOG | {"count": 3}), {"dog": red(LEFT, RIGHT)}, [True, True, False]),
        (wanted(DOG, exclude=[DOG | {"count": 2}]), {"dog": red(LEFT)}, [True, True]),
        (wanted(DOG, exclude=[DOG | {"count": 2}]), {"dog": red(LEFT, RIGHT)}, [True, False]),
        (wanted(DOG, exclude=[{"class": "cat", "count": 1}]), {"dog": red(LEFT)}, [True, True]),
        (wanted(DOG | {"color": "red"}), {"dog": red(LEFT)}, [True, True]),
        (wanted(DOG | {"color": "blue"}), {"dog": red(LEFT)}, [True, False]),
        (wanted(DOG | {"color": "red"}), {}, [False, False]),
        # The most certain ones are looked at, although the second is blue.
        (wanted(DOG | {"color": "blue"}), {"dog": [*red(LEFT), Seen(RIGHT, "blue")]}, [True, False]),
        (
            wanted(DOG | {"color": "blue", "count": 2}),
            {"dog": [*red(LEFT), Seen(RIGHT, "blue")]},
            [True, False, True, True],
        ),
        (
            wanted(DOG, {"class": "cat", "count": 1, "position": ["right of", 0]}),
            {"dog": red(LEFT), "cat": red(RIGHT)},
            [True, True, True],
        ),
        (
            wanted(DOG, {"class": "cat", "count": 1, "position": ["left of", 0]}),
            {"dog": red(LEFT), "cat": red(RIGHT)},
            [True, True, False],
        ),
        (
            wanted(DOG, {"class": "cat", "count": 1, "position": ["right of", 0]}),
            {"cat": red(RIGHT)},
            [False, True, False],
        ),
        # Right of one dog, but not of the other.
        (
            wanted(DOG | {"count": 2}, {"class": "cat", "count": 1, "position": ["right of", 0]}),
            {"dog": red(LEFT, (90, 0, 99, 10)), "cat": red(RIGHT)},
            [True, True, True, False],
        ),
        (
            wanted(DOG | {"count": 1}, {"class": "cat", "count": 1, "position": ["right of", 0]}),
            {"dog": red(LEFT, (90, 0, 99, 10)), "cat": red(RIGHT)},
            [True, True, True],
        ),
    ],
)
def test_checks_by_hand(asked, seen, expected):
    assert checks(asked, seen) == expected


def test_names_are_genevals():
    """Coco's 80 in their order; these four are named otherwise than in COCO."""
    assert len(set(CLASSES)) == 80
    assert {CLASSES[0], CLASSES[16], CLASSES[79]} == {"person", "dog", "toothbrush"}
    assert [CLASSES[i] for i in (64, 65, 66)] == ["computer mouse", "tv remote", "computer keyboard"]


# -- Colours -----------------------------------------------------------------------------------------------------------


def disc(x, y, radius, height=60, width=80):
    rows, columns = torch.arange(height)[:, None], torch.arange(width)
    return (rows - y) ** 2 + (columns - x) ** 2 <= radius**2


def found(label, mask, score=0.95):
    rows, columns = (mask.any(axis).nonzero()[:, 0].tolist() for axis in (1, 0))
    return Found(CLASSES.index(label), score, (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1), mask)


PAINTS = torch.tensor([[220, 20, 30], [20, 40, 200], [250, 240, 40], [30, 30, 30], [240, 240, 240], [40, 160, 60]])


def painted(*masks):
    """Uint8 [3, 60, 80]: each mask in another colour, with stripes, on noise."""
    generator = torch.Generator().manual_seed(len(masks))
    image = torch.randint(0, 256, (3, 60, 80), generator=generator).to(torch.uint8)
    for mask, paint in zip(masks, PAINTS, strict=False):
        image = torch.where(mask, paint[:, None, None].to(torch.uint8), image)
    image[:, ::7] //= 2
    return image


@torch.no_grad()
def expected_colors(directory, image, objects, names):
    """By transformers' CLIP, tokenizer and processor in float64, of pictures cut out by PIL; and the margins."""
    model = CLIPModel.from_pretrained(directory).double().eval()
    edges = {"height": 12, "width": 12}
    processor = CLIPImageProcessorPil(size={"shortest_edge": 12}, crop_size=edges)
    picture = Image.fromarray(image.permute(1, 2, 0).numpy())
    grey = Image.new("RGB", picture.size, "#999")
    colors, margins = [], []
    for each, name in zip(objects, names, strict=True):
        whole = Image.composite(picture, grey, Image.fromarray(each.mask.numpy()))
        pixels = processor(whole.crop(each.box), return_tensors="pt")["pixel_values"].double()
        seen = functional.normalize(model.get_image_features(pixels).pooler_output, dim=-1)
        directions = []
        for color in ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white"):
            texts = [
                f"a photo of a {color} {name}",
                f"a photo of a {color}-colored {name}",
                f"a photo of a {color} object",
            ]
            tokens = clip_tokenizer()(texts, padding=True, return_tensors="pt")
            embedded = functional.normalize(model.get_text_features(**tokens).pooler_output, dim=-1)
            directions.append(functional.normalize(embedded.mean(0), dim=0))
        cosines = (seen @ torch.stack(directions).T)[0]
        best = cosines.topk(2)
        colors.append(COLORS[best.indices[0]])
        margins.append((best.values[0] - best.values[1]).item())
    return colors, margins


def test_colors_are_clips(load, clip):
    masks = [disc(15, 15, 10), disc(45, 20, 14), disc(66, 44, 11), disc(20, 45, 12), disc(70, 10, 6), disc(44, 50, 8)]
    image, names = painted(*masks), ["car", "dog", "car", "bus", "cat", "dog"]
    objects = [found(name, mask) for name, mask in zip(names, masks, strict=True)]
    expected, margins = expected_colors(clip, image, objects, names)
    assert len(set(expected)) > 2
    assert min(margins) > 2e-3  # bytes are rounded, ours are not
    crops = [crop(image / 255, each) for each in objects]
    assert load().colors(crops, names) == expected
    assert load(batch=4).colors(crops, names) == expected
    assert load().colors([], []) == []


# -- Scores ------------------------------------------------------------------------------------------------------------


def test_scores_of_what_is_found(load, monkeypatch):
    """Five pictures in which the same is found: two clocks, a cat right of them and a car below."""
    scorer, share = load(), load(measure="fraction")
    clocks = [found("clock", disc(10, 10, 8), 0.95), found("clock", disc(10, 30, 8), 0.92)]
    others = [found("cat", disc(60, 20, 9), 0.8), found("car", disc(40, 50, 8), 0.5)]
    seen = [*clocks, *others]
    asked = []

    def find(pixels, least):
        asked.extend(least)
        return [[each for each in seen if each.score > above] for above in least]

    cat, car = {"class": "cat", "count": 1}, {"class": "car", "count": 1}
    two = {"class": "clock", "count": 2}
    rows = [
        {"include": [two], "exclude": [two | {"count": 3}], "tag": "counting"},
        {"include": [two | {"count": 3}], "tag": "counting"},
        {"include": [cat], "tag": "counting"},  # found, but not with 0.9
        {"include": [two, cat | {"position": ["right of", 0]}, car | {"position": ["below", 1]}]},
        {"include": [car | {"color": "red"}, cat | {"color": "red"}]},
    ]
    images = painted(*(each.mask for each in seen)).expand(len(rows), -1, -1, -1)
    for each in (scorer, share):
        monkeypatch.setattr(each.detector, "find", find)
        monkeypatch.setattr(each, "colors", lambda crops, names: ["red" if name == "car" else "blue" for name in names])
    prompts = [""] * len(rows)
    assert scorer(images, prompts, rows).tolist() == [1.0, 0.0, 0.0, 1.0, 0.0]
    assert asked == [0.9, 0.9, 0.9, 0.3, 0.3]
    scores = share(images, prompts, rows)
    assert scores.dtype == torch.float32
    assert scores.tolist() == pytest.approx([1.0, 2 / 3, 0.0, 1.0, 3 / 4])


def test_sixteen_of_a_class_count(load, monkeypatch):
    scorer = load()
    many = [found("book", disc(10, 10, 3), 0.99 - i / 100) for i in range(20)]
    monkeypatch.setattr(scorer.detector, "find", lambda pixels, least: [many] * len(pixels))
    rows = [
        {"include": [{"class": "book", "count": 16}]},
        {"include": [{"class": "book", "count": 1}], "exclude": [{"class": "book", "count": 16}]},
    ]
    assert scorer(painted().expand(2, -1, -1, -1), ["", ""], rows).tolist() == [1.0, 0.0]


def test_pictures_of_a_batch_are_scored_one_by_one(load):
    """By real networks, from bytes to shares; the rows ask for what some of the pictures have."""
    images = torch.stack([painted(*(disc(x, 30, 9) for x in range(10, 20 * count, 20))) for count in (1, 2, 3, 4, 5)])
    scorer = load(measure="fraction")
    with torch.no_grad():
        seen = [each for group in scorer.detector.find(images / 255, [0.2] * len(images)) for each in group]
    assert min(abs(each.score - 0.3) for each in seen) > 1e-3  # so that rounding decides nothing
    labels = sorted({CLASSES[each.label] for each in seen if each.score > 0.3})
    assert len(labels) > 1
    rows = [
        {"include": [{"class": name, "count": 2, "color": color} for name in labels]}
        for color in ("red", "blue", "green", "white", "black")
    ]
    prompts = [""] * len(rows)
    together = scorer(images, prompts, rows)
    assert len(set(together.tolist())) > 1
    assert torch.equal(load(measure="fraction", batch=2)(images, prompts, rows), together)
    alone = [scorer(images[i : i + 1], [""], rows[i : i + 1]) for i in range(len(rows))]
    assert torch.equal(torch.cat(alone), together)


@pytest.mark.gpu
def test_a_gpu_scores_as_the_cpu_does(detector, clip):
    images = torch.stack([painted(disc(30, 30, 9)), painted(disc(50, 20, 12), disc(20, 40, 8))])
    rows = [{"include": [{"class": name, "count": 1, "color": "red"} for name in ("elephant", "handbag")]}] * 2
    settings = Geneval(measure="fraction", path=str(detector), processor=str(clip))
    expected = find_scorer("geneval", settings, CPU)(images, ["", ""], rows)
    on_gpu = find_scorer("geneval", settings, torch.device("cuda"))
    assert torch.equal(on_gpu(images.to("cuda"), ["", ""], rows).cpu(), expected)


def test_bfloat16_and_offload(load):
    row = {"include": [{"class": "dog", "count": 1, "color": "red"}]}
    scorer = load(dtype="bfloat16", offload=True)
    assert {parameter.dtype for parameter in scorer.parameters()} == {torch.bfloat16}
    scores = scorer(painted(disc(30, 30, 9))[None], ["a red dog"], [row])
    assert scores.dtype == torch.float32
    assert scores.item() in (0.0, 1.0)
    assert not any(parameter.requires_grad for parameter in scorer.parameters())


# -- Files -------------------------------------------------------------------------------------------------------------


def refused(**settings):
    with pytest.raises(ValueError) as error:  # noqa: PT011
        find_scorer("geneval", Geneval(**settings), CPU)
    text = str(error.value)
    assert text.startswith("rewards.geneval: ")
    assert "\n" not in text
    return text


def test_what_cannot_be_used(detector, clip, tmp_path):
    command = "`hf download facebook/mask2former-swin-small-coco-instance config.json model.safetensors`"
    assert command in refused()
    command = "`hf download openai/clip-vit-large-patch14 config.json model.safetensors tokenizer.json`"
    assert command in refused(path=str(detector))
    assert "expected model_type \"mask2former\", found 'clip'" in refused(path=str(clip))
    assert "expected model_type \"clip\", found 'mask2former'" in refused(path=str(detector), processor=str(detector))
    with pytest.MonkeyPatch.context() as monkeypatch:
        save_detector(tmp_path, monkeypatch, classes=133)
    assert "expected a detector of 80 classes, found one of 133" in refused(path=str(tmp_path))
    assert "backend = 'hpsv2' is not for this reward" in refused(backend="hpsv2")


def test_another_reward_has_no_measure():
    with pytest.raises(TypeError):
        Reward(measure="fraction")
