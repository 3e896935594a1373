# SPDX-License-Identifier: Apache-2.0
"""The writing half of `FaultyRegistry`, and its list of referrers.

server.uploads.location = "relative"       # or "absolute", or a URL prefix of another server
server.uploads.has_referrers = True        # OCI-Subject on push, and /referrers/ answers
server.uploads.page = 2                    # entries per page of /referrers/
server.uploads.heeds_conditions = True     # If-Match and If-None-Match on manifests
"""

from __future__ import annotations

import json
import urllib.parse
from collections.abc import Mapping
from typing import Any

from lazysnap import oci
from lazysnap.digest import Digest

Answer = tuple[int, dict[str, str], bytes]
"""Status, headers, body."""


class Uploads:
    """What is uploaded goes to `blobs` and `manifests`, which belong to the registry.

    Attributes:
        location: how the place of an upload is named.
        has_referrers: whether the registry knows the referrers API.
        applies_filter: whether it filters by artifactType.
        page: entries per page.
        next_link: in place of the Link that continues the list.
        heeds_conditions: whether conditional writes can fail.
        sessions: uploads that were begun.
    """

    def __init__(
        self, blobs: dict[str, bytes], manifests: dict[tuple[str, str], tuple[str, bytes]]
    ) -> None:
        self.blobs = blobs
        self.manifests = manifests
        self.location = "absolute"
        self.has_referrers = False
        self.applies_filter = True
        self.page = 100
        self.next_link: str | None = None
        self.heeds_conditions = False
        self.sessions: set[str] = set()

    def begin(self, host: str, repository: str) -> Answer:
        """POST: a session, whose state is in the query of its place."""
        session = f"{len(self.sessions)}%2F=+"
        self.sessions.add(session)
        path = f"/v2/{repository}/blobs/uploads/session?_state={session}"
        prefix = {"absolute": f"http://{host}", "relative": ""}.get(self.location, self.location)
        return 202, {"Location": prefix + path}, b""

    def finish(self, query: str, body: bytes) -> Answer:
        """PUT: all of a blob."""
        state, _, digest = query.removeprefix("_state=").rpartition("&digest=")
        if state not in self.sessions:
            return 404, {}, b""
        self.sessions.remove(state)
        if Digest.of(body) != urllib.parse.unquote(digest):
            return 400, {}, b'{"errors":[{"code":"DIGEST_INVALID"}]}'
        self.blobs[Digest.of(body)] = body
        return 201, {}, b""

    def store(self, repository: str, name: str, headers: Mapping[str, str], body: bytes) -> Answer:
        """PUT: a manifest."""
        old = self.manifests.get((repository, name))
        etag = f'"{Digest.of(old[1])}"' if old else None
        wanted, unwanted = headers.get("if-match"), headers.get("if-none-match")
        if self.heeds_conditions and ((wanted and wanted != etag) or (unwanted == "*" and old)):
            return 412, {}, b""
        document = json.loads(body)
        parts = [document["config"], *document["layers"]] if "config" in document else []
        if any(part["digest"] not in self.blobs for part in parts):
            return 400, {}, b'{"errors":[{"code":"MANIFEST_BLOB_UNKNOWN"}]}'
        stored = (headers["content-type"], body)
        self.manifests[repository, name] = self.manifests[repository, Digest.of(body)] = stored
        subject = document.get("subject")
        if self.has_referrers and subject:
            return 201, {"OCI-Subject": subject["digest"]}, b""
        return 201, {}, b""

    def referrers(self, repository: str, digest: str, query: str) -> Answer:
        """GET: one page of the manifests that point to a digest."""
        if not self.has_referrers:
            return 404, {"Content-Type": "text/plain"}, b"404 page not found"
        wanted = dict(urllib.parse.parse_qsl(query))
        headers = {"Content-Type": oci.OCI_INDEX}
        found = [
            entry
            for (there, name), (media_type, data) in self.manifests.items()
            if there == repository and ":" in name
            for entry in [_entry(media_type, data, digest)]
            if entry is not None
        ]
        if self.applies_filter and "artifactType" in wanted:
            found = [e for e in found if e["artifactType"] == wanted["artifactType"]]
            headers["OCI-Filters-Applied"] = "artifactType"
        start = int(wanted.get("last", 0))
        if start + self.page < len(found):
            rest = urllib.parse.urlencode({**wanted, "last": start + self.page})
            link = self.next_link or f"/v2/{repository}/referrers/{digest}?{rest}"
            headers["Link"] = f'<{link}>; rel="next"'
        index = {
            "schemaVersion": 2,
            "mediaType": oci.OCI_INDEX,
            "manifests": found[start : start + self.page],
        }
        return 200, headers, json.dumps(index).encode()


def _entry(media_type: str, data: bytes, digest: str) -> dict[str, Any] | None:
    """The descriptor of a manifest in the list of what it points to."""
    document = json.loads(data)
    if document.get("subject", {}).get("digest") != digest:
        return None
    entry = {
        "mediaType": media_type,
        "digest": Digest.of(data),
        "size": len(data),
        "artifactType": document["artifactType"],
    }
    return entry | {k: document[k] for k in ("annotations",) if k in document}
