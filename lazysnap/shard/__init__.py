# SPDX-License-Identifier: Apache-2.0
"""A shard: one FUSE mount that serves many layers; the keeper and worker processes.

Kept between releases
---------------------

Containers go on while the package is upgraded. Their keepers stay those of the earlier release until the
node restarts, and so does the daemon until it is restarted: meanwhile a keeper forks workers of the new
release, and the earlier daemon starts processes of it and calls them. Nothing of this list can change
without breaking mounts of running containers; `tests/shard/test_kept_between_releases.py` pins it.

An earlier keeper and a new worker:

- The keeper imports `lazysnap.shard.worker` and calls `worker.run(operations, root=, number=)`. pyfuse3,
  trio and the standard library are those that the keeper was started with.
- `operations` is the keeper's `Handshake`: pyfuse3 calls the attributes that the worker sets on it. The
  worker cannot change mount options, nor what FUSE_INIT agreed on.
- The worker's exit status 0 says that the file system was unmounted; after any other, such as 75 for
  `restart`, the keeper forks another worker.
- The worker inherits the lock of `shards/<n>.lock`.
- The kernel and clients hold what earlier workers told them: inode numbers (`operations`, `content_view`,
  `store_view`), that names are absent, and that shards below `FIRST_XATTR_SHARD` without `shards/xattrs`
  have no extended attributes.

A new daemon, and what earlier ones left:

- `shards/<n>.lock` is locked and has the keeper's process id; `shards/<n>.sock` is the control socket.
- Keepers are known by the words of their command line: `lazysnap.shard.keeper`, the root, the number.
- Workers of all releases answer `ping` with `pid` and `version`, and follow `restart`.
- `metadata.db` (`store.schema`), `slots/<n>`, `names/<n>`, indexes, images of trees, objects and profiles
  are read as they are, or made anew where a version says that they have another form.

An earlier daemon, until it is restarted:

- It calls new workers, see `calls`, and workers call it: `find`, `used` and `released` at `store.sock`.
- It writes `shards/settings` and `slots/<n>`; the workers read them.
- It starts `python -m` with `lazysnap.shard.keeper` and the options of that, `lazysnap.layers.builder`,
  `lazysnap.unpack.process`, and `lazysnap check` does with `lazysnap.check.trial`; what it sends to them
  keeps its form.
"""
