# SPDX-License-Identifier: Apache-2.0
"""Gets the bytes of files: from the cache, or from the registry through one scheduler, verified.

Knows nothing of FUSE, and does not choose what is fetched before anybody asks. In the order in which to
read:

- `layer_reader`: a read of a file, and the way that it takes when bytes are missing.
- `open_files`: the descriptors of objects and partial files that a process has open.
- `threads`: bounds the threads by what they do.
- `fetcher`: which members are fetched for a reader or a plan, and in which requests.
- `members`: which members a range is in, which lie together, which are in the cache.
- `requests`: one request: received, decoded and stored, at most one at a time for each member.
- `decode`: what a decoding thread does: chunks are verified before they are stored.
- `scheduler`: one order for all requests of a process.
- `byte_source`: what a blob is read from; `tail_source` adds what came with the table of contents.
- `coverage`: how much of a layer is in the cache.
- `trace`: what was fetched lately and who waited for it, for `lazysnap report`.
"""
