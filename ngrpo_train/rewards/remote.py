"""Scorers that a running `ngrpo reward-server` computes."""

# N pictures or videos, F frames of a video.

from __future__ import annotations

import json
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any
from urllib.parse import quote

import torch
from torch import Tensor

from ngrpo_train.prompts import Prompt
from ngrpo_train.recipe.parsing import suggestion
from ngrpo_train.recipe.sections import Reward
from ngrpo_train.rewards import threads, wire
from ngrpo_train.rewards.frames import are_pictures, dtype_and_shape
from ngrpo_train.rewards.http import Endpoint, HttpError, check_url, token_from
from ngrpo_train.rewards.scorer import Scorer

TOKEN_VARIABLE = "NGRPO_REWARD_TOKEN"

_AT_ONCE = 4  # requests: one is scored while the others travel or wait
_ATTEMPTS = 10  # with their pauses, a minute or more in which a server can come back


def load(name: str, settings: Reward, device: torch.device) -> Scorer:
    """The reward that the server at `settings.remote` has under the name `settings.path`, or if that is empty, `name`.

    Raises ValueError where no server answers there, or where it does not have the reward.
    """
    try:
        url = check_url(settings.remote)
    except ValueError as error:
        raise ValueError(f"remote: {error}") from error
    endpoint = Endpoint(url=url, token=token_from(TOKEN_VARIABLE), timeout_s=300.0, deadline_s=900.0)
    wanted = settings.path.rpartition(":")[2] or name  # a server names package.module:callable by its last part
    health = _health(replace(endpoint, attempts=3, timeout_s=10.0), wanted)
    try:
        # A server of ngrpo 0.1.0 says nothing about rows and videos, and takes none.
        offered = {
            str(reward["name"]): (bool(reward.get("rows")), bool(reward.get("videos"))) for reward in health["rewards"]
        }
        body_limit = int(health["max_body_bytes"])
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"remote = {url!r} answers, but is no ngrpo reward server") from error
    if wanted not in offered:
        raise ValueError(
            f"remote = {url!r} has no reward {wanted!r}{suggestion(wanted, offered)}; it has {', '.join(offered)}"
        )
    return _Remote(replace(endpoint, attempts=_ATTEMPTS), wanted, settings.batch, body_limit, *offered[wanted])


def _health(endpoint: Endpoint, wanted: str) -> Any:
    try:
        return json.loads(endpoint.get("/health"))
    except HttpError as error:
        remedy = f"is it the address where `ngrpo reward-server --rewards {wanted}` runs?"
        if error.status == 401:
            remedy = f"set the environment variable {TOKEN_VARIABLE} to the server's token"
        raise ValueError(f"remote = {endpoint.url!r}: {error}; {remedy}") from error
    except ValueError as error:
        raise ValueError(f"remote = {endpoint.url!r} answers, but is no ngrpo reward server") from error


class _Remote:
    """A scorer that sends pictures in parts, several at once. A part that gets no answer is sent again as a whole."""

    def __init__(
        self, endpoint: Endpoint, reward: str, batch: int, body_limit: int, with_rows: bool, takes_videos: bool
    ) -> None:
        self._endpoint, self._reward, self._batch, self._body_limit = endpoint, reward, batch, body_limit
        self._with_rows, self.takes_videos = with_rows, takes_videos

    def __call__(self, images: Tensor, texts: Sequence[str], rows: Sequence[Mapping[str, Any]] = ()) -> Tensor:
        """Float32 [N] on the CPU for N uint8 images, N texts and, where the server wants them, N rows.

        The images are pictures [N, 3, H, W] or, where the server takes them, videos [N, F, 3, H, W]. Raises ValueError
        for samples of another kind, and HttpError where the server gives no usable answer.
        """
        if not are_pictures(images):
            raise ValueError(
                f"{dtype_and_shape(images)} is no batch of pictures or videos, and only these travel to a server: "
                "score it here, without remote"
            )
        images, prompts = images.cpu(), [Prompt(text) for text in texts]
        if rows and self._with_rows:
            prompts = [Prompt(text, row=row) for text, row in zip(texts, rows, strict=True)]
        size = min(self._batch, wire.most_pictures(images, prompts, self._body_limit))
        if size == 0:
            one = f"a video of {images.shape[1]} frames" if images.dim() == 5 else "a picture"
            limit = f"{self._body_limit} bytes: start the server with a larger --max-body-mb"
            if images[0].numel() // 3 > wire.MAX_PIXELS:
                limit = f"{wire.MAX_PIXELS} pixels: score it here, without remote"
            raise ValueError(
                f"{one} of {images.shape[-1]}x{images.shape[-2]} exceeds what {self._endpoint.url} takes in a request, "
                f"{limit}"
            )
        starts = range(0, len(images), size)
        parts = [partial(self._score, images[i : i + size], prompts[i : i + size]) for i in starts]
        return torch.cat(threads.results(threads.start(parts, at_once=_AT_ONCE)))

    def _score(self, images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        path = f"/score?rewards={quote(self._reward, safe='')}"
        identity = {"X-Request-ID": uuid.uuid4().hex}
        body = wire.encode_pictures(images, prompts)
        answer = self._endpoint.post(path, body, wire.SAFETENSORS, identity)
        try:
            return wire.decode_scores(answer, self._reward, len(prompts))
        except ValueError as error:
            raise HttpError(f"POST {self._endpoint.url}{path}: {error}") from error
