# SPDX-License-Identifier: Apache-2.0
"""Registries: endpoints, credentials, manifests, ranges of blobs, artifacts beside images."""

from lazysnap.credentials.docker_config import Chain, Credential, CredentialSource, DockerConfig
from lazysnap.registry.blob import RemoteBlob, Tail
from lazysnap.registry.client import Registry
from lazysnap.registry.hosts import HostTable, RegistrySettings
from lazysnap.registry.image import Image
from lazysnap.registry.referrers import fetch_artifact, find_referrers, push_referrer
from lazysnap.registry.statistics import Statistics
from lazysnap.registry.stream import RangeReader

__all__ = [
    "Chain",
    "Credential",
    "CredentialSource",
    "DockerConfig",
    "HostTable",
    "Image",
    "RangeReader",
    "Registry",
    "RegistrySettings",
    "RemoteBlob",
    "Statistics",
    "Tail",
    "fetch_artifact",
    "find_referrers",
    "push_referrer",
]
