# SPDX-License-Identifier: Apache-2.0
"""HTTP connections to any server, kept for the next request; a transport for httpx.

- `pool`: which connection a request gets, and who waits.
- `connection`: one request and its answer.
- `proxies`: through which proxy a request goes.
- `urls`: reads URLs that somebody else wrote.

Knows nothing of registries.
"""

PORTS = {"http": 80, "https": 443}
"""Of URLs that name none, by their scheme."""
