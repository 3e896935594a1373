# SPDX-License-Identifier: Apache-2.0
"""Opens a layer: from its digest and annotations to a verified index and an image of its tree on disk.

Knows nothing of mounts, of shards or of reading files. In the order in which to read:

- `opener`: what opening means, and which layers are refused.
- `layer_source`: what the opener is given and what it returns.
- `identity`: what makes a layer the one that it is, and the names of indexes.
- `host_turns`: a slow host does not hold up others.
- `builder`, `builder_pool`: a table of contents is parsed in a process of its own; the daemon's end of it.
- `blob_tail`: what came along with the table of contents is kept for whoever fetches members.
- `slots`: which layer a directory of a shard serves, `slots/<slot>`.
- `store_names`: what clients of the layer store call a slot, `names/<slot>`.
- `record_files`: how both are written and read.
- `view`: a layer's tree as a slot shows it.
- `inherited`: what directories that the layer leaves out take over from the layers below.
- `links`: follows symbolic links in any tree.
- `in_use`: which indexes and images of trees the slots need.
- `tree_images`, `tree_image_file`: the tree as an EROFS image in `cache/trees`, and how that is stored.
"""
