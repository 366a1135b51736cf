"""Vision-language models as judges, behind an OpenAI-compatible server (vLLM, SGLang): a question, an answer, a score.

A template says what is asked, and how the answer is read: a TOML file with the fields of `Template`, for a score of one
picture, or of `PairTemplate`, for the better one of two.
"""

# N pictures.

from __future__ import annotations

import base64
import io
import json
import re
import tomllib
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields, replace
from functools import partial
from importlib.resources import files
from pathlib import Path
from typing import Any, Generic, Self, TypeVar

import torch
from PIL import Image
from torch import Tensor

from ngrpo_train.prompts.picture_files import MASK, named_picture, refuse_row, source_picture
from ngrpo_train.recipe.parsing import suggestion
from ngrpo_train.recipe.sections import Reward
from ngrpo_train.rewards import threads
from ngrpo_train.rewards.http import Endpoint, HttpError, check_url, token_from
from ngrpo_train.rewards.scorer import RewardError, Scorer

_API_KEY = "OPENAI_API_KEY"  # a recipe is written to the run's directory, so it must not hold a secret
_ASKED_AGAIN_AT = 0.7  # lowest temperature when a question is repeated
_QUOTED = 200  # characters of an answer


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """What every template says: the question that a judge is asked, and how it is sent."""

    text: str
    """The question. {prompt} in it is replaced by the picture's prompt, unchanged."""
    labels: tuple[str, ...]
    """Regular expressions for the text right before the score or verdict, in order of preference; case is ignored. The
    first expression that matches counts, at its last match: a judge may explain itself before it concludes."""
    model: str = ""
    """The model's name at the server, where rewards.NAME.path is empty."""
    system: str = ""
    image: str = "before"
    """Place of the pictures: "before" the text or "after" it."""
    source: str = ""
    """Field of a prompt's row that names a picture's file. That picture is shown first, as what was to be edited."""
    mask: str = ""
    """"mask" if `source` is shown grey where it was to be filled, as the row's field "mask" says."""
    max_tokens: int = 1024
    """Most tokens of an answer."""
    temperature: float = 0.0
    attempts: int = 3
    """How often a question is sent, at most, until an answer can be read."""
    timeout_s: float = 120.0
    """Seconds to wait for one answer."""

    @property
    def pictures(self) -> tuple[str, ...]:
        """The fields of a row that name pictures; the source's first."""
        return tuple(field for field in (self.source, self.mask) if field)


@dataclass(frozen=True, slots=True, kw_only=True)
class Template(Question):
    """A question about one picture, whose answer has a score."""

    minimum: float
    """The lowest score there is. A number below it, or above `maximum`, is not a score."""
    maximum: float
    combine: str = "first"
    """"first": the score is the number behind the first of `labels` that occurs.
    "minimum", "mean": all of `labels` must occur, and the score is the least or the mean of their numbers."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PairTemplate(Question):
    """A question about two pictures, whose answer says which one is better."""

    first: str
    """Regular expression for the verdict that the picture that is shown first is better; case is ignored."""
    second: str
    tie: str = ""
    """The verdict that they are equally good. Empty: the judge has to choose."""


Q = TypeVar("Q", bound=Question)
T = TypeVar("T")


@dataclass(frozen=True)
class Respondent(Generic[Q]):
    """A model at a server that answers a template's question; the part that all scorers by judges share."""

    name: str
    """The reward's, for messages."""
    endpoint: Endpoint
    model: str
    template: Q
    in_flight: int
    """Questions that are asked at once."""

    @classmethod
    def connect(cls, name: str, settings: Reward, template: Q, **more: Any) -> Self:
        """The respondent of a recipe's [rewards.NAME]; `more` are a subclass's own fields. Its server must be running.

        Raises ValueError for an address or a model that cannot be found.
        """
        model = settings.path or template.model
        start = f"`vllm serve {model or 'MODEL'} --port 8000`"
        if not settings.remote:
            raise ValueError(f"a judge needs a server: {start}, then rewards.{name}.remote = 'http://localhost:8000'")
        if not model:
            raise ValueError(f"its template names no model: set rewards.{name}.path to the model's name at the server")
        url = check_url(settings.remote)
        endpoint = Endpoint(
            url=url if url.endswith("/v1") else f"{url}/v1", token=token_from(_API_KEY), timeout_s=template.timeout_s
        )
        _refuse_missing(name, model, endpoint, start)
        return cls(name, endpoint, model, template, settings.batch, **more)

    def check(self, prompt: str, row: Mapping[str, Any]) -> None:
        """Raise ValueError, "needs ...", where the template shows a row's picture, and this row has none."""
        refuse_row(row, self.template.pictures)

    def sources(self, images: Tensor, prompts: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> list[list[str]]:
        """What is shown before the results of N prompts: for each a data URL of its row's picture, or nothing.

        It is scaled and cut to the size of the results, `images` [N, 3, H, W], as it was for the model that made them:
        else a judge would miss in a result what the model never saw. Each file is read once. Raises RewardError, naming
        prompt and file, for one that cannot be read.
        """
        urls: dict[tuple[Path, ...], str] = {}
        shown: list[list[str]] = []
        for prompt, row in zip(prompts, rows or [{}] * len(prompts), strict=True):
            if not self.template.pictures:
                shown.append([])
                continue
            try:
                files = tuple(named_picture(row, field) for field in self.template.pictures)
                if files not in urls:
                    urls[files] = _data_url(source_picture(row, self.template.pictures, *images.shape[-2:]))
            except ValueError as error:
                raise RewardError(f"rewards.{self.name}, for the prompt {prompt!r}: {error}") from error
            shown.append([urls[files]])
        return shown

    def answer(self, pictures: Sequence[str], prompt: str, what: str, read: Callable[[str], T]) -> T:
        """What `read` finds in an answer about these data URLs; it raises ValueError where it finds no `what`.

        Raises HttpError where the server does not answer, and RewardError, naming prompt and answer, where nothing is
        found in any of `template.attempts` answers.
        """
        messages = _messages(self.template, pictures, prompt)
        temperature = self.template.temperature
        for attempt in range(self.template.attempts):
            body = {
                "model": self.model,
                "messages": messages,
                "max_tokens": self.template.max_tokens,
                "temperature": temperature,
                "seed": attempt,
            }
            answer = self.endpoint.post("/chat/completions", json.dumps(body).encode(), "application/json")
            try:
                return read(answer_text(answer))
            except ValueError as error:
                reason, last = error, answer
                # The likeliest answer would only come again. So the next ones are drawn, with fixed seeds.
                temperature = max(temperature, _ASKED_AGAIN_AT)
        raise RewardError(
            f"rewards.{self.name}: no {what} for the prompt {prompt!r} in {self.template.attempts} answers of "
            f"{self.model}: {reason}; the last is {self._quoted(last)!r}"
        ) from reason

    def _quoted(self, answer: bytes) -> str:
        """The beginning of the answer's text, or, where it has no text, of its body."""
        try:
            text, _ = _content(answer)
        except ValueError:
            text = ""
        text = text or answer.decode(errors="replace")
        return (text.replace(self.endpoint.token, "***") if self.endpoint.token else text)[:_QUOTED]


def _refuse_missing(name: str, model: str, endpoint: Endpoint, start: str) -> None:
    try:
        listed = json.loads(replace(endpoint, attempts=2).get("/models"))
        models = [entry["id"] for entry in listed["data"]]
    except HttpError as error:
        if error.status in (404, 405):  # a server does not have to list its models
            return
        remedy = f"set {_API_KEY}" if error.status in (401, 403) else f"start it with {start}"
        raise ValueError(f"{error}; {remedy}") from error
    except (ValueError, LookupError, TypeError) as error:
        raise ValueError(f"{endpoint.url} is no server of OpenAI's kind: /models has no list of models") from error
    if model not in models:
        known = ", ".join(map(str, models)) or "none"
        raise ValueError(f"{endpoint.url} has no model {model!r}: set rewards.{name}.path to one of its own, {known}")


def load(name: str, settings: Reward, device: torch.device) -> Scorer:
    """The judge that a recipe's [rewards.NAME] means, asked from this process.

    Raises ValueError for a template, an address or a model that cannot be found.
    """
    return Judge.connect(name, settings, read_template(settings.template or settings.kind or name, Template))


class Judge(Respondent[Template]):
    """A scorer: float32 [N] on the CPU for uint8 images [N, 3, H, W], N prompts and their rows.

    It asks one question for each picture.
    """

    def __call__(self, images: Tensor, prompts: Sequence[str], rows: Sequence[Mapping[str, Any]] = ()) -> Tensor:
        each = zip(images.cpu(), prompts, self.sources(images, prompts, rows), strict=True)
        scores = threads.start([partial(self._score, *one) for one in each], at_once=self.in_flight)
        return torch.tensor(threads.results(scores), dtype=torch.float32)

    def _score(self, picture: Tensor, prompt: str, sources: Sequence[str]) -> float:
        return self.answer([*sources, data_url(picture)], prompt, "score", partial(read_score, template=self.template))


def data_url(picture: Tensor) -> str:
    """The picture, uint8 [3, H, W], as a lossless data URL."""
    return _data_url(Image.fromarray(picture.permute(1, 2, 0).contiguous().numpy()))


def _data_url(picture: Image.Image) -> str:
    file = io.BytesIO()
    picture.save(file, "PNG", compress_level=1)  # light compression: time counts here, and the server is near
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"


def _messages(template: Question, pictures: Sequence[str], prompt: str) -> list[dict[str, Any]]:
    # Not str.format: a brace in either text would mean something to it.
    text = [{"type": "text", "text": template.text.replace("{prompt}", prompt)}]
    images = [{"type": "image_url", "image_url": {"url": picture}} for picture in pictures]
    content = [*images, *text] if template.image == "before" else [*text, *images]
    system = [{"role": "system", "content": template.system}] if template.system else []
    return [*system, {"role": "user", "content": content}]


# --- answers


def answer_text(answer: bytes) -> str:
    """The text of a chat completion. Raises ValueError, with the reason, where it has no text or is cut off."""
    text, finish_reason = _content(answer)
    if finish_reason == "length":  # a number at the cut may have lost its last digits, and a conclusion may be missing
        raise ValueError("the answer was cut off at max_tokens")
    if not text.strip():
        raise ValueError("the answer is empty")
    return text


def _content(answer: bytes) -> tuple[str, str]:
    """The text of a chat completion's first choice, empty where it has no text, and the reason why it ended."""
    try:
        choice = json.loads(answer)["choices"][0]
        content, finish_reason = choice["message"]["content"], choice.get("finish_reason")
    except (ValueError, LookupError, TypeError) as error:
        raise ValueError("the server's answer is no chat completion") from error
    if isinstance(content, list):
        content = "".join(str(part.get("text") or "") for part in content if isinstance(part, Mapping))
    return content if isinstance(content, str) else "", str(finish_reason)


_THOUGHT = re.compile(r"\A.*</think(?:ing)?>|<think(?:ing)?>.*", re.DOTALL | re.IGNORECASE)
_FORMATTING = str.maketrans({"*": "", "`": "", "_": " "})
_OPENING = r"""[\s"'$(\[{<]*(?:\\boxed\{\s*)?"""
_NUMBER = re.compile(
    _OPENING
    + r"""
    (?P<value>[-+]?\d+(?:[.,]\d+)?)
    (?![.,]?\d|\s*[%\N{FRACTION SLASH}]|\s*(?:[-~\N{EN DASH}\N{EM DASH}]|to|or)\s*\d)   # no part, share or range
    (?:\s*\(?(?:/|out\s+of)\s*(?P<best>\d+(?:[.,]\d+)?))?
    """,
    re.VERBOSE | re.IGNORECASE,
)


def read_score(text: str, template: Template) -> float:
    """The score in an answer's text: the number right behind a label, or what `combine` makes of several.

    Raises ValueError, with the reason, if there is none.
    """
    text = _plain(text)
    if template.combine == "first":
        return _number_behind(_label_in(text, template.labels), text, template)
    numbers = [_number_behind(_label_in(text, [label]), text, template) for label in template.labels]
    return min(numbers) if template.combine == "minimum" else sum(numbers) / len(numbers)


def read_winner(text: str, template: PairTemplate) -> float:
    """The verdict in an answer's text: 1 if the first picture is better, 0 if the second is, 1/2 for a tie.

    Raises ValueError, with the reason, if there is none.
    """
    text = _plain(text)
    label = _label_in(text, template.labels)
    verdicts = {1.0: template.first, 0.0: template.second, 0.5: template.tie}
    found = [
        share
        for share, verdict in verdicts.items()
        if verdict and re.compile(rf"{_OPENING}(?:{verdict})(?!\w)", re.IGNORECASE).match(text, label.end())
    ]
    if len(found) != 1:
        where = f"behind {label.group().strip()!r}" if label.group().strip() else "where it should"
        raise ValueError(f"no verdict stands {where}" if not found else f"more than one verdict stands {where}")
    return found[0]


def _plain(text: str) -> str:
    """An answer's text without thoughts and formatting."""
    text = unicodedata.normalize("NFKC", text)  # turns full-width digits and colons into plain ones
    return _THOUGHT.sub("", text).translate(_FORMATTING)


def _label_in(text: str, labels: Sequence[str]) -> re.Match[str]:
    """The last match of the first label that occurs. Raises ValueError if none does."""
    for label in labels:
        *_, last = [None, *re.finditer(label, text, re.IGNORECASE)]
        if last is not None:
            return last
    raise ValueError("the answer has none of the template's labels")


def _number_behind(label: re.Match[str], text: str, template: Template) -> float:
    number = _NUMBER.match(text, label.end())
    if number is None:
        raise ValueError(f"no number stands behind {label.group().strip()!r}")
    value = _float(number["value"])
    if number["best"] and _float(number["best"]) != template.maximum:
        raise ValueError(f"{number.group().strip()} is on a scale that does not end at {template.maximum:g}")
    if not template.minimum <= value <= template.maximum:
        raise ValueError(f"{value:g} is not from {template.minimum:g} to {template.maximum:g}")
    return value


def _float(number: str) -> float:
    return float(number.replace(",", "."))


# --- templates


def read_template(name: str, kind: type[Q]) -> Q:
    """A packaged template, by its name, or one from a TOML file, which is of class `kind`.

    Raises ValueError that says what is wrong with it.
    """
    packaged = {
        path.name.removesuffix(".toml"): path for path in (files("ngrpo_train.rewards") / "templates").iterdir()
    }
    source = packaged.get(name, Path(name).expanduser())
    try:
        return _template(tomllib.loads(source.read_text(encoding="utf-8")), kind)
    except OSError as error:
        names = ", ".join(sorted(packaged))
        raise ValueError(f"template {name!r} is no file and none of {names}{suggestion(name, packaged)}") from error
    except ValueError as error:
        raise ValueError(f"template {name!r}: {error}") from error


_KINDS: dict[str, tuple[type | tuple[type, ...], str]] = {
    "str": (str, "a string"),
    "tuple[str, ...]": (list, "a list of strings"),
    "float": ((int, float), "a number"),
    "int": (int, "a whole number"),
}


def _template(values: dict[str, Any], kind: type[Q]) -> Q:
    if kind is Template and {"first", "second"} & values.keys():
        raise ValueError('it asks which of two pictures is better: set kind = "pairwise"')
    if kind is PairTemplate and {"minimum", "maximum"} & values.keys():
        raise ValueError('it asks for the score of one picture, and kind = "pairwise" needs one about two')
    known = {field.name: field for field in fields(kind)}
    for key, value in values.items():
        if key not in known:
            raise ValueError(f"it has no field {key!r}{suggestion(key, known)}; there are {', '.join(known)}")
        of_type, description = _KINDS[str(known[key].type)]
        if not isinstance(value, of_type) or isinstance(value, bool):
            raise ValueError(f"{key} = {value!r} must be {description}")
    if missing := [key for key, field in known.items() if field.default is MISSING and key not in values]:
        raise ValueError(f"it lacks {', '.join(missing)}")
    template = kind(**values | {"labels": tuple(values["labels"])})
    if "{prompt}" not in template.text:
        raise ValueError("text must have {prompt} where the picture's prompt belongs")
    patterns = [("labels", label) for label in template.labels]
    _require(bool(template.labels), "labels", template.labels, "must not be empty")
    _require(template.image in ("before", "after"), "image", template.image, 'must be "before" or "after"')
    _require(template.mask in ("", MASK), "mask", template.mask, f'must be "{MASK}", or be left out')
    _require(bool(template.source) or not template.mask, "mask", template.mask, "is a source's, and there is no source")
    if isinstance(template, Template):
        least, most, combine = template.minimum, template.maximum, template.combine
        _require(least < most, "minimum", least, f"must be below {most:g}")
        known_ways = ("first", "minimum", "mean")
        _require(combine in known_ways, "combine", combine, f"must be one of {', '.join(known_ways)}")
    if isinstance(template, PairTemplate):
        verdicts = {key: getattr(template, key) for key in ("first", "second", "tie")}
        for key in ("first", "second"):
            _require(bool(verdicts[key]), key, verdicts[key], "must not be empty")
        patterns += verdicts.items()
    for key, pattern in patterns:
        try:
            re.compile(pattern)
        except (re.error, TypeError) as error:
            raise ValueError(f"{key}: {pattern!r} is no regular expression: {error}") from error
    _require(template.max_tokens > 0, "max_tokens", template.max_tokens, "must be positive")
    _require(template.temperature >= 0, "temperature", template.temperature, "must be 0 or more")
    _require(template.attempts > 0, "attempts", template.attempts, "must be positive")
    _require(template.timeout_s > 0, "timeout_s", template.timeout_s, "must be positive")
    return template


def _require(condition: bool, key: str, value: object, rule: str) -> None:
    if not condition:
        raise ValueError(f"{key} = {value!r} {rule}")
