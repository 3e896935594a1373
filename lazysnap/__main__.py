# SPDX-License-Identifier: Apache-2.0
"""`python -m lazysnap`: the same as the `lazysnap` command."""

from lazysnap.cli import main

if __name__ == "__main__":
    main()
