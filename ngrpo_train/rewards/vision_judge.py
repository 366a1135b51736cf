"""Vision-language models as judges, behind an OpenAI-compatible server (vLLM, SGLang): a question, an answer, a score.

A template says what is asked and where in the answer the score stands: a TOML file with the fields of `Template`.
"""

# N pictures.

from __future__ import annotations

import base64
import io
import json
import re
import tomllib
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, fields, replace
from functools import partial
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from ngrpo_train.recipe.parsing import suggestion
from ngrpo_train.recipe.sections import Reward
from ngrpo_train.rewards import threads
from ngrpo_train.rewards.http import Endpoint, HttpError, check_url, token_from
from ngrpo_train.rewards.scorer import RewardError, Scorer

_API_KEY = "OPENAI_API_KEY"  # a recipe is written to the run's directory, so it must not hold a secret
_ASKED_AGAIN_AT = 0.7  # lowest temperature when a question is repeated
_QUOTED = 200  # characters of an answer


@dataclass(frozen=True, slots=True, kw_only=True)
class Template:
    """The question that a judge is asked about one picture, and how its answer is read."""

    text: str
    """The question. {prompt} in it is replaced by the picture's prompt, unchanged."""
    labels: tuple[str, ...]
    """Regular expressions for the text right before the score, in order of preference; case is ignored. The first
    expression that matches counts, at its last match: a judge may explain itself before it gives the score."""
    minimum: float
    """The lowest score there is. A number below it, or above `maximum`, is not a score."""
    maximum: float
    model: str = ""
    """The model's name at the server, where rewards.NAME.path is empty."""
    system: str = ""
    image: str = "before"
    """Place of the picture: "before" the text or "after" it."""
    max_tokens: int = 1024
    """Most tokens of an answer."""
    temperature: float = 0.0
    attempts: int = 3
    """Questions about one picture, at most, until an answer has a score."""
    timeout_s: float = 120.0
    """Seconds to wait for one answer."""


def load(name: str, settings: Reward, device: torch.device) -> Scorer:
    """The judge that a recipe's [rewards.NAME] means, asked from this process. Its server must be running.

    Raises ValueError for a template, an address or a model that cannot be found.
    """
    template = read_template(settings.template or settings.kind or name)
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
    return Judge(name, endpoint, model, template, settings.batch)


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


class Judge:
    """A scorer: float32 [N] on the CPU for uint8 images [N, 3, H, W] and N prompts.

    It asks one question for each picture, `in_flight` at a time. Raises HttpError where the server does not answer,
    and RewardError, naming prompt and answer, where no answer has a score.
    """

    def __init__(self, name: str, endpoint: Endpoint, model: str, template: Template, in_flight: int) -> None:
        self.name, self.endpoint, self.model, self.template = name, endpoint, model, template
        self._in_flight = in_flight

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        questions = [partial(self._score, *pair) for pair in zip(images.cpu(), prompts, strict=True)]
        return torch.tensor(threads.results(threads.start(questions, at_once=self._in_flight)), dtype=torch.float32)

    def _score(self, picture: Tensor, prompt: str) -> float:
        messages = _messages(self.template, _data_url(picture), prompt)
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
                return read_score(answer_text(answer), self.template)
            except ValueError as error:
                reason, last = error, answer
                # The likeliest answer would only come again. So the next ones are drawn, with fixed seeds.
                temperature = max(temperature, _ASKED_AGAIN_AT)
        raise RewardError(
            f"rewards.{self.name}: no score for the prompt {prompt!r} in {self.template.attempts} answers of "
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


def _data_url(picture: Tensor) -> str:
    """The picture, uint8 [3, H, W], as a lossless data URL."""
    file = io.BytesIO()
    # Light compression: time counts here, and the server is near.
    Image.fromarray(picture.permute(1, 2, 0).contiguous().numpy()).save(file, "PNG", compress_level=1)
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"


def _messages(template: Template, data_url: str, prompt: str) -> list[dict[str, Any]]:
    # Not str.format: a brace in either text would mean something to it.
    text = {"type": "text", "text": template.text.replace("{prompt}", prompt)}
    image = {"type": "image_url", "image_url": {"url": data_url}}
    content = [image, text] if template.image == "before" else [text, image]
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
_NUMBER = re.compile(
    r"""
    [\s"'$(\[{<]*(?:\\boxed\{\s*)?
    (?P<value>[-+]?\d+(?:[.,]\d+)?)
    (?![.,]?\d|\s*[%\N{FRACTION SLASH}]|\s*(?:[-~\N{EN DASH}\N{EM DASH}]|to|or)\s*\d)   # no part, share or range
    (?:\s*\(?(?:/|out\s+of)\s*(?P<best>\d+(?:[.,]\d+)?))?
    """,
    re.VERBOSE | re.IGNORECASE,
)


def read_score(text: str, template: Template) -> float:
    """The score in an answer's text: the number right behind the label. Raises ValueError, with the reason, if none."""
    text = unicodedata.normalize("NFKC", text)  # turns full-width digits and colons into plain ones
    text = _THOUGHT.sub("", text).translate(_FORMATTING)
    for label in template.labels:
        *_, last = [None, *re.finditer(label, text, re.IGNORECASE)]
        if last is None:
            continue
        number = _NUMBER.match(text, last.end())
        if number is None:
            raise ValueError(f"no number stands behind {last.group().strip()!r}")
        value = _float(number["value"])
        if number["best"] and _float(number["best"]) != template.maximum:
            raise ValueError(f"{number.group().strip()} is on a scale that does not end at {template.maximum:g}")
        if not template.minimum <= value <= template.maximum:
            raise ValueError(f"{value:g} is not from {template.minimum:g} to {template.maximum:g}")
        return value
    raise ValueError("the answer has none of the template's labels")


def _float(number: str) -> float:
    return float(number.replace(",", "."))


# --- templates


def read_template(name: str) -> Template:
    """A packaged template, by its name, or one from a TOML file. Raises ValueError that says what is wrong with it."""
    packaged = {
        path.name.removesuffix(".toml"): path for path in (files("ngrpo_train.rewards") / "templates").iterdir()
    }
    source = packaged.get(name, Path(name).expanduser())
    try:
        return _template(tomllib.loads(source.read_text(encoding="utf-8")))
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


def _template(values: dict[str, Any]) -> Template:
    known = {field.name: field for field in fields(Template)}
    for key, value in values.items():
        if key not in known:
            raise ValueError(f"it has no field {key!r}{suggestion(key, known)}; there are {', '.join(known)}")
        kind, description = _KINDS[str(known[key].type)]
        if not isinstance(value, kind) or isinstance(value, bool):
            raise ValueError(f"{key} = {value!r} must be {description}")
    if missing := [key for key, field in known.items() if field.default is MISSING and key not in values]:
        raise ValueError(f"it lacks {', '.join(missing)}")
    template = Template(**values | {"labels": tuple(values["labels"])})
    if "{prompt}" not in template.text:
        raise ValueError("text must have {prompt} where the picture's prompt belongs")
    for label in template.labels:
        try:
            re.compile(label)
        except (re.error, TypeError) as error:
            raise ValueError(f"labels: {label!r} is no regular expression: {error}") from error
    _require(bool(template.labels), "labels", template.labels, "must not be empty")
    _require(template.image in ("before", "after"), "image", template.image, 'must be "before" or "after"')
    _require(template.minimum < template.maximum, "minimum", template.minimum, f"must be below {template.maximum:g}")
    _require(template.max_tokens > 0, "max_tokens", template.max_tokens, "must be positive")
    _require(template.temperature >= 0, "temperature", template.temperature, "must be 0 or more")
    _require(template.attempts > 0, "attempts", template.attempts, "must be positive")
    _require(template.timeout_s > 0, "timeout_s", template.timeout_s, "must be positive")
    return template


def _require(condition: bool, key: str, value: object, rule: str) -> None:
    if not condition:
        raise ValueError(f"{key} = {value!r} {rule}")
