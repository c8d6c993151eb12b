"""Which model a call means: by ModelMesh's headers or the name in the message; the registry is asked on a miss."""

from __future__ import annotations

import unicodedata
from collections.abc import Callable
from typing import Final

from cachetools import TTLCache

from mesh.errors import InvalidRequest, ModelNotFound, RegistryUnavailable, Unimplemented
from mesh.mirror import Mirror
from mesh.registry.base import RegistryError
from mesh.rpc import Call, Head
from mesh.wire import peek_string
from placement.records import ModelId, VModelRecord, model_key, vmodel_key
from placement.sides import Sides
from placement.view import ClusterView

MAX_ID_BYTES: Final = 512

_MISS_TTL_S: Final = 1.0
_MISSES: Final = 10_000

TAG: Final = "densemesh-tag"
"""Request header of clients: which side of a vmodel they want, while it has two."""
LATEST, PREVIOUS = "latest", "prev"
"""KServe's words for the target and the active model."""
STICKY: Final = "densemesh-sticky"
"""Request header of clients: a key; requests with the same one go to the same side of a vmodel."""
_STICKY: Final = frozenset((STICKY, f"{STICKY}-bin"))

NAMING: Final = frozenset(
    f"{key}{suffix}" for key in ("mm-model-id", "mm-vmodel-id", "mm-required", TAG) for suffix in ("", "-bin")
)
"""Headers that say which model a call means."""
_NAMED: Final = "directory.named"
_MODEL, _VMODEL = "mm-model-id", "mm-vmodel-id"


class Directory:
    """Names to registered models."""

    def __init__(self, view: ClusterView, mirror: Mirror, clock: Callable[[], float], sides: Sides) -> None:
        self._view = view
        self._mirror = mirror
        self._sides = sides
        # A name asked for again and again must not become a read of the registry each time; the watch brings it anyway.
        self._misses: TTLCache[str, bool] = TTLCache(_MISSES, _MISS_TTL_S, clock)

    async def resolve(self, call: Call, message: bytes, field_number: int, *, splits: bool = False) -> ModelId:
        """The concrete model of a model-scoped call; `splits`: calls of its kind are what a canary gets a share of.

        `mm-model-id` names a model, `mm-vmodel-id` a vmodel (each also as `-bin`); without either, the name in the
        message is a vmodel's if there is one, else a model's. A vmodel is its active model, unless `densemesh-tag` or
        a canary's share says otherwise.

        Raises:
            InvalidRequest: no name, both headers, or a name that cannot be one.
            ModelNotFound, RegistryUnavailable, Unimplemented
        """
        known = self.known(call, message, field_number)
        if known is not None:
            return known
        models, vmodels = call.texts(_MODEL), call.texts(_VMODEL)
        if call.texts("mm-required"):
            raise Unimplemented("header mm-required (one request to several models) is not supported")
        if len(models) + len(vmodels) > 1:
            raise InvalidRequest("headers mm-model-id and mm-vmodel-id: expected one id in all, found several")
        if models:
            return await self.model(check_id("header mm-model-id", models[0]))
        if vmodels:
            return self._side(await self._vmodel(check_id("header mm-vmodel-id", vmodels[0])), call, splits)
        name = peek_string(message, field_number)
        if not name:
            raise InvalidRequest("the model's name is missing from both the message and the header mm-model-id")
        found = await self._entry(check_id("the model's name", name))
        return self._side(found, call, splits) if isinstance(found, VModelRecord) else found

    def _side(self, vmodel: VModelRecord, call: Call, splits: bool) -> ModelId:
        """Which of a vmodel's models a call is for."""
        tag = self._named(call)[2]
        if vmodel.active == vmodel.target or not (tag or (splits and vmodel.canary_percent)):
            return vmodel.active
        if tag:
            model_id = vmodel.target if tag == LATEST else vmodel.active
        else:
            model_id = self._sides.choose(vmodel, next(iter(call.texts(STICKY)), None))
        call.side = vmodel.vmodel_id, side_of(vmodel, model_id)
        return model_id

    def draw(self, name: str, head: Head) -> tuple[ModelId, str] | None:
        """For the next request for a vmodel in transition, without headers that name or tag it: the model, and which
        side that is; None: it is not split, or goes by its key. `give_back` what is not used."""
        vmodel = self._view.vmodels[name]
        if not vmodel.canary_percent or not head.keys.isdisjoint(_STICKY):
            return None
        model_id = self._sides.choose(vmodel, None)
        return model_id, side_of(vmodel, model_id)

    def give_back(self, name: str, model_id: ModelId) -> None:
        """What `draw` said was not used; the request is resolved anew."""
        self._sides.give_back(name, model_id)

    def is_named(self, head: Call | Head) -> bool:
        """Whether headers have a say in which model is meant.

        Raises:
            InvalidRequest
        """
        kind, _, tag = self._named(head)
        return bool(kind or tag)

    def _named(self, head: Call | Head) -> tuple[str, str, str]:
        named: tuple[str, str, str] | None = head.memo.get(_NAMED)
        if named is None:
            named = head.memo[_NAMED] = _named(head)
        return named

    def known(self, head: Call | Head, message: bytes, field_number: int) -> ModelId | None:
        """What `resolve` says, if that can be said at once and for all calls that are alike; None: ask it. What is
        registered can be a name.

        Raises:
            InvalidRequest
        """
        kind, name, tag = head.memo.get(_NAMED) or self._named(head)
        if not kind and not tag:
            return self.known_name(peek_string(message, field_number) or "")
        if kind == _MODEL:
            return name if name in self._view.models else None
        name = name if kind else peek_string(message, field_number) or ""
        vmodel = self._view.vmodels.get(name)
        if vmodel is None:
            return name if not kind and name in self._view.models else None
        return None if vmodel.canary_percent or (tag and vmodel.active != vmodel.target) else vmodel.active

    def known_name(self, name: str) -> ModelId | None:
        """What `named` says, if that is in the view and requests are not split."""
        vmodel = self._view.vmodels.get(name)
        if vmodel is not None:
            return None if vmodel.canary_percent else vmodel.active
        return name if name in self._view.models else None

    async def named(self, name: str) -> ModelId:
        """The active model of the vmodel of that name if there is one, else the model of that name.

        Raises:
            ModelNotFound, RegistryUnavailable
        """
        found = await self._entry(name)
        return found.active if isinstance(found, VModelRecord) else found

    async def _entry(self, name: str) -> VModelRecord | ModelId:
        """The vmodel of that name if there is one, else the model's id."""
        vmodel = self._view.vmodels.get(name)
        if vmodel is not None:
            return vmodel
        if name in self._view.models:
            return name
        try:
            return await self._vmodel(name)
        except ModelNotFound:
            return await self.model(name)

    async def model(self, model_id: ModelId) -> ModelId:
        """The id, if it is registered.

        Raises:
            ModelNotFound, RegistryUnavailable
        """
        if model_id not in self._view.models and not await self._fetch(model_key(model_id)):
            raise ModelNotFound(f"model {model_id!r} is not registered")
        return model_id

    async def refresh(self, model_id: ModelId) -> None:
        """Read a model's registration past the watch's lag: somebody else knows a later one.

        Raises:
            RegistryUnavailable
        """
        self._misses.pop(model_key(model_id), None)
        await self._fetch(model_key(model_id))

    async def vmodel(self, vmodel_id: str) -> ModelId:
        """The active model of a vmodel.

        Raises:
            ModelNotFound, RegistryUnavailable
        """
        return (await self._vmodel(vmodel_id)).active

    async def _vmodel(self, vmodel_id: str) -> VModelRecord:
        if vmodel_id not in self._view.vmodels and not await self._fetch(vmodel_key(vmodel_id)):
            raise ModelNotFound(f"vmodel {vmodel_id!r} is not registered")
        return self._view.vmodels[vmodel_id]

    async def _fetch(self, key: str) -> bool:
        """Whether the registry has the key, which is then in the view."""
        if key in self._misses:
            return False
        try:
            found = await self._mirror.fetch(key) is not None
        except RegistryError as error:
            raise RegistryUnavailable(f"the registry does not answer: {error}") from None
        if not found:
            self._misses[key] = True
        return found


def side_of(vmodel: VModelRecord, model_id: ModelId) -> str:
    return "target" if model_id == vmodel.target else "active"


def _named(head: Call | Head) -> tuple[str, str, str]:
    """The header that names the model or vmodel, if one does, and the name, no name if there are several; and the tag.

    Raises:
        InvalidRequest
    """
    if head.keys is not None and head.keys.isdisjoint(NAMING):
        return "", "", ""
    call = head if isinstance(head, Call) else Call(head.path, head.metadata, 0, keys=head.keys)
    models, vmodels = call.texts(_MODEL), call.texts(_VMODEL)
    tag = next(iter(call.texts(TAG)), "")
    if tag not in ("", LATEST, PREVIOUS):
        raise InvalidRequest(f"header {TAG}: expected {LATEST} or {PREVIOUS}, found {tag[:64]!r}")
    if call.texts("mm-required") or len(models) + len(vmodels) > 1:
        return _MODEL, "", tag
    if models:
        return _MODEL, models[0], tag
    return (_VMODEL, vmodels[0], tag) if vmodels else ("", "", tag)


def check_id(what: str, name: str) -> str:
    """The name, if it can be a model's or vmodel's id.

    Raises:
        InvalidRequest
    """
    if not name:
        raise InvalidRequest(f"{what}: expected a non-empty id")
    if len(name.encode()) > MAX_ID_BYTES:
        raise InvalidRequest(f"{what}: expected at most {MAX_ID_BYTES} bytes, found {len(name.encode())}")
    if any(unicodedata.category(c) == "Cc" for c in name):
        raise InvalidRequest(f"{what}: expected no control characters in {name!r}")
    return name
