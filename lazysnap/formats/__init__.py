# SPDX-License-Identifier: Apache-2.0
"""Formats of layers: gzip and zstd members, tars, tables of contents. Bytes become objects, without I/O.

All that is read here comes from outside and is taken for hostile: each parser has limits, and refuses
with a `FormatError`. In the order in which to read:

- `gzip`, `zstd`: one member or frame at a time, with a bound on what comes out.
- `location`: where a table of contents (TOC) is in a blob, and what checks it.
- `stargz`, `zstdchunked`: the two families of lazy formats: annotations, footers, the compressed TOC.
- `identify`: which of them a layer has. A new format is a module here and a line there.
- `verify`: the only two ways to a TOC that the rest of the program takes.
- `toc`: its JSON, entry by entry.
- `tar`: headers of ordinary layers, for those that are unpacked.
- `elf`: which libraries a program names, for what is fetched ahead.
"""
