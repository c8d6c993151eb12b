from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class RegisterModelRequest(_message.Message):
    __slots__ = ("modelId", "modelInfo", "loadNow", "sync", "lastUsedTime")
    MODELID_FIELD_NUMBER: _ClassVar[int]
    MODELINFO_FIELD_NUMBER: _ClassVar[int]
    LOADNOW_FIELD_NUMBER: _ClassVar[int]
    SYNC_FIELD_NUMBER: _ClassVar[int]
    LASTUSEDTIME_FIELD_NUMBER: _ClassVar[int]
    modelId: str
    modelInfo: ModelInfo
    loadNow: bool
    sync: bool
    lastUsedTime: int
    def __init__(self, modelId: _Optional[str] = ..., modelInfo: _Optional[_Union[ModelInfo, _Mapping]] = ..., loadNow: _Optional[bool] = ..., sync: _Optional[bool] = ..., lastUsedTime: _Optional[int] = ...) -> None: ...

class ModelInfo(_message.Message):
    __slots__ = ("type", "path", "key")
    TYPE_FIELD_NUMBER: _ClassVar[int]
    PATH_FIELD_NUMBER: _ClassVar[int]
    KEY_FIELD_NUMBER: _ClassVar[int]
    type: str
    path: str
    key: str
    def __init__(self, type: _Optional[str] = ..., path: _Optional[str] = ..., key: _Optional[str] = ...) -> None: ...

class ModelStatusInfo(_message.Message):
    __slots__ = ("status", "errors", "modelCopyInfos")
    class ModelStatus(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
        __slots__ = ()
        NOT_FOUND: _ClassVar[ModelStatusInfo.ModelStatus]
        NOT_LOADED: _ClassVar[ModelStatusInfo.ModelStatus]
        LOADING: _ClassVar[ModelStatusInfo.ModelStatus]
        LOADED: _ClassVar[ModelStatusInfo.ModelStatus]
        LOADING_FAILED: _ClassVar[ModelStatusInfo.ModelStatus]
        UNKNOWN: _ClassVar[ModelStatusInfo.ModelStatus]
    NOT_FOUND: ModelStatusInfo.ModelStatus
    NOT_LOADED: ModelStatusInfo.ModelStatus
    LOADING: ModelStatusInfo.ModelStatus
    LOADED: ModelStatusInfo.ModelStatus
    LOADING_FAILED: ModelStatusInfo.ModelStatus
    UNKNOWN: ModelStatusInfo.ModelStatus
    class ModelCopyInfo(_message.Message):
        __slots__ = ("location", "copyStatus", "time")
        LOCATION_FIELD_NUMBER: _ClassVar[int]
        COPYSTATUS_FIELD_NUMBER: _ClassVar[int]
        TIME_FIELD_NUMBER: _ClassVar[int]
        location: str
        copyStatus: ModelStatusInfo.ModelStatus
        time: int
        def __init__(self, location: _Optional[str] = ..., copyStatus: _Optional[_Union[ModelStatusInfo.ModelStatus, str]] = ..., time: _Optional[int] = ...) -> None: ...
    STATUS_FIELD_NUMBER: _ClassVar[int]
    ERRORS_FIELD_NUMBER: _ClassVar[int]
    MODELCOPYINFOS_FIELD_NUMBER: _ClassVar[int]
    status: ModelStatusInfo.ModelStatus
    errors: _containers.RepeatedScalarFieldContainer[str]
    modelCopyInfos: _containers.RepeatedCompositeFieldContainer[ModelStatusInfo.ModelCopyInfo]
    def __init__(self, status: _Optional[_Union[ModelStatusInfo.ModelStatus, str]] = ..., errors: _Optional[_Iterable[str]] = ..., modelCopyInfos: _Optional[_Iterable[_Union[ModelStatusInfo.ModelCopyInfo, _Mapping]]] = ...) -> None: ...

class UnregisterModelRequest(_message.Message):
    __slots__ = ("modelId",)
    MODELID_FIELD_NUMBER: _ClassVar[int]
    modelId: str
    def __init__(self, modelId: _Optional[str] = ...) -> None: ...

class UnregisterModelResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class GetStatusRequest(_message.Message):
    __slots__ = ("modelId",)
    MODELID_FIELD_NUMBER: _ClassVar[int]
    modelId: str
    def __init__(self, modelId: _Optional[str] = ...) -> None: ...

class EnsureLoadedRequest(_message.Message):
    __slots__ = ("modelId", "lastUsedTime", "sync")
    MODELID_FIELD_NUMBER: _ClassVar[int]
    LASTUSEDTIME_FIELD_NUMBER: _ClassVar[int]
    SYNC_FIELD_NUMBER: _ClassVar[int]
    modelId: str
    lastUsedTime: int
    sync: bool
    def __init__(self, modelId: _Optional[str] = ..., lastUsedTime: _Optional[int] = ..., sync: _Optional[bool] = ...) -> None: ...

class VModelStatusInfo(_message.Message):
    __slots__ = ("status", "activeModelId", "targetModelId", "activeModelStatus", "targetModelStatus", "owner", "canary_percent")
    class VModelStatus(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
        __slots__ = ()
        NOT_FOUND: _ClassVar[VModelStatusInfo.VModelStatus]
        DEFINED: _ClassVar[VModelStatusInfo.VModelStatus]
        TRANSITIONING: _ClassVar[VModelStatusInfo.VModelStatus]
        TRANSITION_FAILED: _ClassVar[VModelStatusInfo.VModelStatus]
        UNKNOWN: _ClassVar[VModelStatusInfo.VModelStatus]
    NOT_FOUND: VModelStatusInfo.VModelStatus
    DEFINED: VModelStatusInfo.VModelStatus
    TRANSITIONING: VModelStatusInfo.VModelStatus
    TRANSITION_FAILED: VModelStatusInfo.VModelStatus
    UNKNOWN: VModelStatusInfo.VModelStatus
    STATUS_FIELD_NUMBER: _ClassVar[int]
    ACTIVEMODELID_FIELD_NUMBER: _ClassVar[int]
    TARGETMODELID_FIELD_NUMBER: _ClassVar[int]
    ACTIVEMODELSTATUS_FIELD_NUMBER: _ClassVar[int]
    TARGETMODELSTATUS_FIELD_NUMBER: _ClassVar[int]
    OWNER_FIELD_NUMBER: _ClassVar[int]
    CANARY_PERCENT_FIELD_NUMBER: _ClassVar[int]
    status: VModelStatusInfo.VModelStatus
    activeModelId: str
    targetModelId: str
    activeModelStatus: ModelStatusInfo
    targetModelStatus: ModelStatusInfo
    owner: str
    canary_percent: int
    def __init__(self, status: _Optional[_Union[VModelStatusInfo.VModelStatus, str]] = ..., activeModelId: _Optional[str] = ..., targetModelId: _Optional[str] = ..., activeModelStatus: _Optional[_Union[ModelStatusInfo, _Mapping]] = ..., targetModelStatus: _Optional[_Union[ModelStatusInfo, _Mapping]] = ..., owner: _Optional[str] = ..., canary_percent: _Optional[int] = ...) -> None: ...

class SetVModelRequest(_message.Message):
    __slots__ = ("vModelId", "targetModelId", "updateOnly", "modelInfo", "autoDeleteTargetModel", "loadNow", "force", "sync", "expectedTargetModelId", "owner", "canary_percent")
    VMODELID_FIELD_NUMBER: _ClassVar[int]
    TARGETMODELID_FIELD_NUMBER: _ClassVar[int]
    UPDATEONLY_FIELD_NUMBER: _ClassVar[int]
    MODELINFO_FIELD_NUMBER: _ClassVar[int]
    AUTODELETETARGETMODEL_FIELD_NUMBER: _ClassVar[int]
    LOADNOW_FIELD_NUMBER: _ClassVar[int]
    FORCE_FIELD_NUMBER: _ClassVar[int]
    SYNC_FIELD_NUMBER: _ClassVar[int]
    EXPECTEDTARGETMODELID_FIELD_NUMBER: _ClassVar[int]
    OWNER_FIELD_NUMBER: _ClassVar[int]
    CANARY_PERCENT_FIELD_NUMBER: _ClassVar[int]
    vModelId: str
    targetModelId: str
    updateOnly: bool
    modelInfo: ModelInfo
    autoDeleteTargetModel: bool
    loadNow: bool
    force: bool
    sync: bool
    expectedTargetModelId: str
    owner: str
    canary_percent: int
    def __init__(self, vModelId: _Optional[str] = ..., targetModelId: _Optional[str] = ..., updateOnly: _Optional[bool] = ..., modelInfo: _Optional[_Union[ModelInfo, _Mapping]] = ..., autoDeleteTargetModel: _Optional[bool] = ..., loadNow: _Optional[bool] = ..., force: _Optional[bool] = ..., sync: _Optional[bool] = ..., expectedTargetModelId: _Optional[str] = ..., owner: _Optional[str] = ..., canary_percent: _Optional[int] = ...) -> None: ...

class DeleteVModelRequest(_message.Message):
    __slots__ = ("vModelId", "owner")
    VMODELID_FIELD_NUMBER: _ClassVar[int]
    OWNER_FIELD_NUMBER: _ClassVar[int]
    vModelId: str
    owner: str
    def __init__(self, vModelId: _Optional[str] = ..., owner: _Optional[str] = ...) -> None: ...

class DeleteVModelResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class GetVModelStatusRequest(_message.Message):
    __slots__ = ("vModelId", "owner")
    VMODELID_FIELD_NUMBER: _ClassVar[int]
    OWNER_FIELD_NUMBER: _ClassVar[int]
    vModelId: str
    owner: str
    def __init__(self, vModelId: _Optional[str] = ..., owner: _Optional[str] = ...) -> None: ...

class GetStateRequest(_message.Message):
    __slots__ = ("models",)
    MODELS_FIELD_NUMBER: _ClassVar[int]
    models: bool
    def __init__(self, models: _Optional[bool] = ...) -> None: ...

class MeshState(_message.Message):
    __slots__ = ("pod_id", "pods", "models", "models_registered", "fates")
    POD_ID_FIELD_NUMBER: _ClassVar[int]
    PODS_FIELD_NUMBER: _ClassVar[int]
    MODELS_FIELD_NUMBER: _ClassVar[int]
    MODELS_REGISTERED_FIELD_NUMBER: _ClassVar[int]
    FATES_FIELD_NUMBER: _ClassVar[int]
    pod_id: str
    pods: _containers.RepeatedCompositeFieldContainer[PodState]
    models: _containers.RepeatedCompositeFieldContainer[ModelState]
    models_registered: int
    fates: RequestFates
    def __init__(self, pod_id: _Optional[str] = ..., pods: _Optional[_Iterable[_Union[PodState, _Mapping]]] = ..., models: _Optional[_Iterable[_Union[ModelState, _Mapping]]] = ..., models_registered: _Optional[int] = ..., fates: _Optional[_Union[RequestFates, _Mapping]] = ...) -> None: ...

class PodState(_message.Message):
    __slots__ = ("pod_id", "address", "version", "capacity_bytes", "used_bytes", "models_loaded", "models_loading", "models_failed", "draining", "oldest_used_ms", "labels")
    POD_ID_FIELD_NUMBER: _ClassVar[int]
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    CAPACITY_BYTES_FIELD_NUMBER: _ClassVar[int]
    USED_BYTES_FIELD_NUMBER: _ClassVar[int]
    MODELS_LOADED_FIELD_NUMBER: _ClassVar[int]
    MODELS_LOADING_FIELD_NUMBER: _ClassVar[int]
    MODELS_FAILED_FIELD_NUMBER: _ClassVar[int]
    DRAINING_FIELD_NUMBER: _ClassVar[int]
    OLDEST_USED_MS_FIELD_NUMBER: _ClassVar[int]
    LABELS_FIELD_NUMBER: _ClassVar[int]
    pod_id: str
    address: str
    version: str
    capacity_bytes: int
    used_bytes: int
    models_loaded: int
    models_loading: int
    models_failed: int
    draining: bool
    oldest_used_ms: int
    labels: str
    def __init__(self, pod_id: _Optional[str] = ..., address: _Optional[str] = ..., version: _Optional[str] = ..., capacity_bytes: _Optional[int] = ..., used_bytes: _Optional[int] = ..., models_loaded: _Optional[int] = ..., models_loading: _Optional[int] = ..., models_failed: _Optional[int] = ..., draining: _Optional[bool] = ..., oldest_used_ms: _Optional[int] = ..., labels: _Optional[str] = ...) -> None: ...

class GetMemoryRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class MemoryState(_message.Message):
    __slots__ = ("pod_id", "tiers", "tenants", "models", "check", "device_lost")
    POD_ID_FIELD_NUMBER: _ClassVar[int]
    TIERS_FIELD_NUMBER: _ClassVar[int]
    TENANTS_FIELD_NUMBER: _ClassVar[int]
    MODELS_FIELD_NUMBER: _ClassVar[int]
    CHECK_FIELD_NUMBER: _ClassVar[int]
    DEVICE_LOST_FIELD_NUMBER: _ClassVar[int]
    pod_id: str
    tiers: _containers.RepeatedCompositeFieldContainer[TierMemory]
    tenants: _containers.RepeatedCompositeFieldContainer[TenantMemory]
    models: _containers.RepeatedCompositeFieldContainer[ModelMemory]
    check: MemoryCheck
    device_lost: str
    def __init__(self, pod_id: _Optional[str] = ..., tiers: _Optional[_Iterable[_Union[TierMemory, _Mapping]]] = ..., tenants: _Optional[_Iterable[_Union[TenantMemory, _Mapping]]] = ..., models: _Optional[_Iterable[_Union[ModelMemory, _Mapping]]] = ..., check: _Optional[_Union[MemoryCheck, _Mapping]] = ..., device_lost: _Optional[str] = ...) -> None: ...

class TierMemory(_message.Message):
    __slots__ = ("name", "capacity_bytes", "promised_bytes", "loading_bytes", "loaded_bytes", "unloading_bytes", "free_bytes", "shared_bytes")
    NAME_FIELD_NUMBER: _ClassVar[int]
    CAPACITY_BYTES_FIELD_NUMBER: _ClassVar[int]
    PROMISED_BYTES_FIELD_NUMBER: _ClassVar[int]
    LOADING_BYTES_FIELD_NUMBER: _ClassVar[int]
    LOADED_BYTES_FIELD_NUMBER: _ClassVar[int]
    UNLOADING_BYTES_FIELD_NUMBER: _ClassVar[int]
    FREE_BYTES_FIELD_NUMBER: _ClassVar[int]
    SHARED_BYTES_FIELD_NUMBER: _ClassVar[int]
    name: str
    capacity_bytes: int
    promised_bytes: int
    loading_bytes: int
    loaded_bytes: int
    unloading_bytes: int
    free_bytes: int
    shared_bytes: int
    def __init__(self, name: _Optional[str] = ..., capacity_bytes: _Optional[int] = ..., promised_bytes: _Optional[int] = ..., loading_bytes: _Optional[int] = ..., loaded_bytes: _Optional[int] = ..., unloading_bytes: _Optional[int] = ..., free_bytes: _Optional[int] = ..., shared_bytes: _Optional[int] = ...) -> None: ...

class TenantMemory(_message.Message):
    __slots__ = ("tenant", "tier", "size_bytes")
    TENANT_FIELD_NUMBER: _ClassVar[int]
    TIER_FIELD_NUMBER: _ClassVar[int]
    SIZE_BYTES_FIELD_NUMBER: _ClassVar[int]
    tenant: str
    tier: str
    size_bytes: int
    def __init__(self, tenant: _Optional[str] = ..., tier: _Optional[str] = ..., size_bytes: _Optional[int] = ...) -> None: ...

class ModelMemory(_message.Message):
    __slots__ = ("model_id", "tenant", "tier", "state", "size_bytes", "charged_bytes")
    MODEL_ID_FIELD_NUMBER: _ClassVar[int]
    TENANT_FIELD_NUMBER: _ClassVar[int]
    TIER_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    SIZE_BYTES_FIELD_NUMBER: _ClassVar[int]
    CHARGED_BYTES_FIELD_NUMBER: _ClassVar[int]
    model_id: str
    tenant: str
    tier: str
    state: str
    size_bytes: int
    charged_bytes: int
    def __init__(self, model_id: _Optional[str] = ..., tenant: _Optional[str] = ..., tier: _Optional[str] = ..., state: _Optional[str] = ..., size_bytes: _Optional[int] = ..., charged_bytes: _Optional[int] = ...) -> None: ...

class MemoryCheck(_message.Message):
    __slots__ = ("expected_bytes", "resident_bytes", "device_used_bytes", "alarms")
    EXPECTED_BYTES_FIELD_NUMBER: _ClassVar[int]
    RESIDENT_BYTES_FIELD_NUMBER: _ClassVar[int]
    DEVICE_USED_BYTES_FIELD_NUMBER: _ClassVar[int]
    ALARMS_FIELD_NUMBER: _ClassVar[int]
    expected_bytes: int
    resident_bytes: int
    device_used_bytes: int
    alarms: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, expected_bytes: _Optional[int] = ..., resident_bytes: _Optional[int] = ..., device_used_bytes: _Optional[int] = ..., alarms: _Optional[_Iterable[str]] = ...) -> None: ...

class ExplainRequest(_message.Message):
    __slots__ = ("model_id",)
    MODEL_ID_FIELD_NUMBER: _ClassVar[int]
    model_id: str
    def __init__(self, model_id: _Optional[str] = ...) -> None: ...

class Explanation(_message.Message):
    __slots__ = ("model_id", "pod_id", "placement", "size_bytes", "reasons", "pods")
    MODEL_ID_FIELD_NUMBER: _ClassVar[int]
    POD_ID_FIELD_NUMBER: _ClassVar[int]
    PLACEMENT_FIELD_NUMBER: _ClassVar[int]
    SIZE_BYTES_FIELD_NUMBER: _ClassVar[int]
    REASONS_FIELD_NUMBER: _ClassVar[int]
    PODS_FIELD_NUMBER: _ClassVar[int]
    model_id: str
    pod_id: str
    placement: Placement
    size_bytes: int
    reasons: _containers.RepeatedScalarFieldContainer[str]
    pods: _containers.RepeatedCompositeFieldContainer[PodVerdict]
    def __init__(self, model_id: _Optional[str] = ..., pod_id: _Optional[str] = ..., placement: _Optional[_Union[Placement, _Mapping]] = ..., size_bytes: _Optional[int] = ..., reasons: _Optional[_Iterable[str]] = ..., pods: _Optional[_Iterable[_Union[PodVerdict, _Mapping]]] = ...) -> None: ...

class Placement(_message.Message):
    __slots__ = ("tenant", "min_copies", "max_copies", "pinned", "idle_unload_s", "requires", "priority", "slo_ms", "stopped")
    TENANT_FIELD_NUMBER: _ClassVar[int]
    MIN_COPIES_FIELD_NUMBER: _ClassVar[int]
    MAX_COPIES_FIELD_NUMBER: _ClassVar[int]
    PINNED_FIELD_NUMBER: _ClassVar[int]
    IDLE_UNLOAD_S_FIELD_NUMBER: _ClassVar[int]
    REQUIRES_FIELD_NUMBER: _ClassVar[int]
    PRIORITY_FIELD_NUMBER: _ClassVar[int]
    SLO_MS_FIELD_NUMBER: _ClassVar[int]
    STOPPED_FIELD_NUMBER: _ClassVar[int]
    tenant: str
    min_copies: int
    max_copies: int
    pinned: bool
    idle_unload_s: int
    requires: str
    priority: str
    slo_ms: int
    stopped: bool
    def __init__(self, tenant: _Optional[str] = ..., min_copies: _Optional[int] = ..., max_copies: _Optional[int] = ..., pinned: _Optional[bool] = ..., idle_unload_s: _Optional[int] = ..., requires: _Optional[str] = ..., priority: _Optional[str] = ..., slo_ms: _Optional[int] = ..., stopped: _Optional[bool] = ...) -> None: ...

class PodVerdict(_message.Message):
    __slots__ = ("pod_id", "can_load", "reasons", "parts_ms", "total_ms")
    class PartsMsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: float
        def __init__(self, key: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...
    POD_ID_FIELD_NUMBER: _ClassVar[int]
    CAN_LOAD_FIELD_NUMBER: _ClassVar[int]
    REASONS_FIELD_NUMBER: _ClassVar[int]
    PARTS_MS_FIELD_NUMBER: _ClassVar[int]
    TOTAL_MS_FIELD_NUMBER: _ClassVar[int]
    pod_id: str
    can_load: bool
    reasons: _containers.RepeatedScalarFieldContainer[str]
    parts_ms: _containers.ScalarMap[str, float]
    total_ms: float
    def __init__(self, pod_id: _Optional[str] = ..., can_load: _Optional[bool] = ..., reasons: _Optional[_Iterable[str]] = ..., parts_ms: _Optional[_Mapping[str, float]] = ..., total_ms: _Optional[float] = ...) -> None: ...

class ModelState(_message.Message):
    __slots__ = ("model_id", "info", "status")
    MODEL_ID_FIELD_NUMBER: _ClassVar[int]
    INFO_FIELD_NUMBER: _ClassVar[int]
    STATUS_FIELD_NUMBER: _ClassVar[int]
    model_id: str
    info: ModelInfo
    status: ModelStatusInfo
    def __init__(self, model_id: _Optional[str] = ..., info: _Optional[_Union[ModelInfo, _Mapping]] = ..., status: _Optional[_Union[ModelStatusInfo, _Mapping]] = ...) -> None: ...

class RequestFates(_message.Message):
    __slots__ = ("hits", "joins", "loads", "forwards", "refusals", "retries", "evictions", "loads_finished", "loads_failed")
    HITS_FIELD_NUMBER: _ClassVar[int]
    JOINS_FIELD_NUMBER: _ClassVar[int]
    LOADS_FIELD_NUMBER: _ClassVar[int]
    FORWARDS_FIELD_NUMBER: _ClassVar[int]
    REFUSALS_FIELD_NUMBER: _ClassVar[int]
    RETRIES_FIELD_NUMBER: _ClassVar[int]
    EVICTIONS_FIELD_NUMBER: _ClassVar[int]
    LOADS_FINISHED_FIELD_NUMBER: _ClassVar[int]
    LOADS_FAILED_FIELD_NUMBER: _ClassVar[int]
    hits: int
    joins: int
    loads: int
    forwards: int
    refusals: int
    retries: int
    evictions: int
    loads_finished: int
    loads_failed: int
    def __init__(self, hits: _Optional[int] = ..., joins: _Optional[int] = ..., loads: _Optional[int] = ..., forwards: _Optional[int] = ..., refusals: _Optional[int] = ..., retries: _Optional[int] = ..., evictions: _Optional[int] = ..., loads_finished: _Optional[int] = ..., loads_failed: _Optional[int] = ...) -> None: ...

class Tenant(_message.Message):
    __slots__ = ("tenant_id", "guaranteed_bytes", "max_bytes", "weight", "max_loads", "max_models")
    TENANT_ID_FIELD_NUMBER: _ClassVar[int]
    GUARANTEED_BYTES_FIELD_NUMBER: _ClassVar[int]
    MAX_BYTES_FIELD_NUMBER: _ClassVar[int]
    WEIGHT_FIELD_NUMBER: _ClassVar[int]
    MAX_LOADS_FIELD_NUMBER: _ClassVar[int]
    MAX_MODELS_FIELD_NUMBER: _ClassVar[int]
    tenant_id: str
    guaranteed_bytes: int
    max_bytes: int
    weight: int
    max_loads: int
    max_models: int
    def __init__(self, tenant_id: _Optional[str] = ..., guaranteed_bytes: _Optional[int] = ..., max_bytes: _Optional[int] = ..., weight: _Optional[int] = ..., max_loads: _Optional[int] = ..., max_models: _Optional[int] = ...) -> None: ...

class TenantState(_message.Message):
    __slots__ = ("tenant", "used_bytes", "models_registered")
    TENANT_FIELD_NUMBER: _ClassVar[int]
    USED_BYTES_FIELD_NUMBER: _ClassVar[int]
    MODELS_REGISTERED_FIELD_NUMBER: _ClassVar[int]
    tenant: Tenant
    used_bytes: int
    models_registered: int
    def __init__(self, tenant: _Optional[_Union[Tenant, _Mapping]] = ..., used_bytes: _Optional[int] = ..., models_registered: _Optional[int] = ...) -> None: ...

class DeleteTenantRequest(_message.Message):
    __slots__ = ("tenant_id",)
    TENANT_ID_FIELD_NUMBER: _ClassVar[int]
    tenant_id: str
    def __init__(self, tenant_id: _Optional[str] = ...) -> None: ...

class DeleteTenantResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ListTenantsRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class Tenants(_message.Message):
    __slots__ = ("tenants",)
    TENANTS_FIELD_NUMBER: _ClassVar[int]
    tenants: _containers.RepeatedCompositeFieldContainer[TenantState]
    def __init__(self, tenants: _Optional[_Iterable[_Union[TenantState, _Mapping]]] = ...) -> None: ...
