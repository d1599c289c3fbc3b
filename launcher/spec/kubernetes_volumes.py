"""`cluster.kubernetes.volumes:` what the pods mount beside the job file. Runs anywhere; read `kubernetes.py` next."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from launcher.spec.base import PATTERN_WORDS, Section
from launcher.spec.kubernetes_names import ObjectName, RelativePath

MountPath = Annotated[
    str,
    Field(
        pattern=r"^(/[A-Za-z0-9._@+-]+)+$",
        json_schema_extra={
            PATTERN_WORDS: "no absolute path of plain letters, digits and ._@+- without a slash at its end"
        },
    ),
]
"""Where something lies in the pods."""

# CSI drivers that know no volumes inside a pod; theirs are made once, as a PersistentVolume with a claim.
_ONLY_CLAIMS = ("s3.csi.aws.com", "efs.csi.aws.com", "fsx.csi.aws.com", "filestore.csi.storage.gke.io")


class _Volume(Section):
    path: MountPath
    """Where the pods see it."""

    @property
    def holds_runs(self) -> bool:
        """Whether all pods could write to it and read what another wrote."""
        return False


class _Writable(_Volume):
    read_only: bool = False
    """Mount it so that nothing can be written."""

    @property
    def holds_runs(self) -> bool:
        return not self.read_only


class ClaimVolume(_Writable):
    """A PersistentVolumeClaim that is there; on several nodes its access mode must be ReadWriteMany."""

    type: Literal["pvc"]
    claim: ObjectName
    """Name of the claim."""
    sub_path: RelativePath | None = None
    """Directory inside the volume to mount instead of all of it."""


class CsiVolume(_Writable):
    """A volume that a CSI driver makes for each pod, such as a bucket through `gcsfuse.csi.storage.gke.io`."""

    type: Literal["csi"]
    driver: ObjectName
    """Name of the driver."""
    attributes: dict[str, str] = Field(default_factory=dict)
    """What the driver wants to know: `{bucketName: my-bucket, mountOptions: implicit-dirs}`."""
    secret: ObjectName | None = None
    """Secret that the driver publishes the volume with."""

    @model_validator(mode="after")
    def _inline(self) -> "CsiVolume":
        if self.driver in _ONLY_CLAIMS:
            raise ValueError(
                f"driver {self.driver} mounts no volumes of a pod's own; make a PersistentVolume with a claim of it "
                "and mount that with type: pvc"
            )
        return self


class NfsVolume(_Writable):
    """A directory of an NFS server."""

    type: Literal["nfs"]
    server: str = Field(min_length=1)
    """Name or address of the server."""
    share: MountPath
    """Directory that the server exports."""


class SecretVolume(_Volume):
    """The keys of a Secret as files, read-only."""

    type: Literal["secret"]
    secret: ObjectName
    """Name of the Secret."""


class ConfigMapVolume(_Volume):
    """The keys of a ConfigMap as files, read-only."""

    type: Literal["config_map"]
    config_map: ObjectName
    """Name of the ConfigMap."""


class HostPathVolume(_Writable):
    """A directory of each node; runs may lie there only where all nodes see the same (Lustre, a mounted NFS)."""

    type: Literal["host_path"]
    host_path: MountPath
    """Directory on the nodes; it must be there."""


Volume = Annotated[
    ClaimVolume | CsiVolume | NfsVolume | SecretVolume | ConfigMapVolume | HostPathVolume, Field(discriminator="type")
]
