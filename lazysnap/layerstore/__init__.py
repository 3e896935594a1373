# SPDX-License-Identifier: Apache-2.0
"""The additional layer store of containers/storage: Podman, Buildah and CRI-O use lazy layers.

A client finds a layer as `<root>/store/<base64 of the image's reference>/<digest>`, which is looked up
in the FUSE mount of a shard (`lazysnap.shard.store_view`). What is not known there is asked here: each
layer is a snapshot of its own, without a parent, as clients put layers together and remove them one by
one.
"""
