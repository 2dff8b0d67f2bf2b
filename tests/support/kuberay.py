"""What a RayJob and a RayCluster may hold, as JSON schemas: the fields of KubeRay 1.6's API reference
(https://docs.ray.io/en/master/cluster/kubernetes/references/api.html), less those for other storages and schedulers.

KubeRay's own schemas are a megabyte each, nearly all of it pod templates, which test_cluster.py checks against those of
Kubernetes.
"""

from __future__ import annotations

from typing import Any

TEXT, FLAG, COUNT = {"type": "string"}, {"type": "boolean"}, {"type": "integer", "minimum": 0}
TEXTS = {"type": "object", "additionalProperties": TEXT}
POD_TEMPLATE = {"type": "object", "required": ["spec"]}


def _object(required: list[str], **fields: Any) -> dict[str, Any]:
    return {"type": "object", "properties": fields, "required": required, "additionalProperties": False}


def _resource(kind: str, spec: dict[str, Any]) -> dict[str, Any]:
    head = {"apiVersion": {"const": "ray.io/v1"}, "kind": {"const": kind}}
    metadata = _object(["name"], name=TEXT, namespace=TEXT, labels=TEXTS, annotations=TEXTS)
    return _object(["apiVersion", "kind", "metadata", "spec"], **head, metadata=metadata, spec=spec)


HEAD_GROUP = _object(
    ["template"],
    template=POD_TEMPLATE,
    rayStartParams=TEXTS,
    serviceType={"enum": ["ClusterIP", "NodePort", "LoadBalancer", "ExternalName"]},
    headService={"type": "object"},
    enableIngress=FLAG,
    labels=TEXTS,
    resources=TEXTS,
)
WORKER_GROUP = _object(
    ["groupName", "template"],
    groupName=TEXT,
    replicas=COUNT,
    minReplicas=COUNT,
    maxReplicas=COUNT,
    numOfHosts=COUNT,
    idleTimeoutSeconds=COUNT,
    rayStartParams=TEXTS,
    template=POD_TEMPLATE,
    suspend=FLAG,
    labels=TEXTS,
    resources=TEXTS,
)
CLUSTER = _object(
    ["headGroupSpec"],
    rayVersion=TEXT,
    authOptions=_object([], mode={"enum": ["disabled", "token"]}, secretName=TEXT, enableK8sTokenAuth=FLAG),
    enableInTreeAutoscaling=FLAG,
    headServiceAnnotations=TEXTS,
    suspend=FLAG,
    headGroupSpec=HEAD_GROUP,
    workerGroupSpecs={"type": "array", "items": WORKER_GROUP},
)
JOB = _object(
    [],
    entrypoint=TEXT,
    entrypointNumCpus={"type": "number"},
    entrypointNumGpus={"type": "number"},
    entrypointResources=TEXT,
    runtimeEnvYAML=TEXT,
    jobId=TEXT,
    metadata=TEXTS,
    submissionMode={"enum": ["K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode"]},
    submitterPodTemplate=POD_TEMPLATE,
    submitterConfig=_object([], backoffLimit=COUNT),
    backoffLimit=COUNT,
    activeDeadlineSeconds=COUNT,
    ttlSecondsAfterFinished=COUNT,
    shutdownAfterJobFinishes=FLAG,
    suspend=FLAG,
    clusterSelector=TEXTS,
    rayClusterSpec=CLUSTER,
)
SCHEMAS = {"RayCluster": _resource("RayCluster", CLUSTER), "RayJob": _resource("RayJob", JOB)}
