# SPDX-License-Identifier: Apache-2.0
"""What is told of the start of an image: gathered from the workers and the disk, estimated, drawn."""
