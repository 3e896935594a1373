# SPDX-License-Identifier: Apache-2.0
"""Chooses what is fetched before anybody reads it: from profiles, and from what is read.

All of it is advice: if it is wrong, something is fetched in vain. In the order in which to read:

- `queue`: works through plans of all layers, the most urgent first.
- `profile`: what an image reads while it starts, as a document and as a plan.
- `profile_store`: the profiles of a node, `profiles/<manifest>.json`.
- `recorder`: notes what is read, for a profile.
- `guesser`: where no profile says it, what readers will want next after what they had to wait for.
- `tree_walks`: somebody walks through a layer, so the walk is fetched ahead of it.
- `libraries`: the libraries of a program, before the dynamic linker asks for them.
- `overlay_lookup`: finds these by path, as overlayfs would in all layers of an image.
- `readahead`: what is local already is read from the disk in advance.
"""
