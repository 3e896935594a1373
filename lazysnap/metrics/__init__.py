# SPDX-License-Identifier: Apache-2.0
"""Numbers for operators: counted in each process, added up by the daemon, written for Prometheus.

`counts` is what the parts of lazysnap call; `families` says what each number means; `totals` adds up
processes that come and go; `exposition` writes the text format. No label is a layer, image or path.
"""
