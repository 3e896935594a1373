# SPDX-License-Identifier: Apache-2.0
"""The index of a layer: its tree and chunks in flat arrays that are mapped into memory, not loaded.

It is built once from a verified table of contents, and read by each process that serves the layer.
Pure: bytes in, bytes or values out. In the order in which to read:

- `model`: the values that an index gives.
- `layout`: its bytes: sections of records of fixed width.
- `treereader`, `reader`: read it in place; `reader.LayerIndex` is what all others use.
- `build`: from a table of contents to a layer in memory.
- `tree`: the rules by which entries become a tree, as containerd would unpack them.
- `content`: chunks are checked, keyed and grouped into members.
- `codec`: writes the layer in memory as an index.
- `dump`: an index as text, for people.
"""
