# SPDX-License-Identifier: Apache-2.0
"""How a page looks."""

STYLE = """
:root { color-scheme: light dark; --text: #1f2328; --dim: #656d76; --line: #d0d7de; --page: #fff;
  --demand: #d97706; --prefetch: #2563eb; --background: #94a3b8; --mounting: #16a34a; --wait: #dc2626; }
@media (prefers-color-scheme: dark) {
  :root { --text: #e6edf3; --dim: #8d96a0; --line: #30363d; --page: #0d1117; } }
body { margin: 0; background: var(--page); color: var(--text); font: 14px/1.45 system-ui, sans-serif; }
main { max-width: 1240px; margin: 0 auto; padding: 16px; overflow-wrap: anywhere; }
h1 { font-size: 22px; margin: 8px 0; } h2 { font-size: 17px; margin: 28px 0 8px; }
h3 { font-size: 14px; margin: 16px 0 4px; }
.about, .legend { color: var(--dim); }
.tiles { display: flex; flex-wrap: wrap; gap: 12px; }
.tiles div { border: 1px solid var(--line); border-radius: 6px; padding: 8px 14px; }
.tiles b { display: block; font-size: 20px; } .tiles span { color: var(--dim); }
.missing { border-left: 4px solid var(--demand); padding: 4px 4px 4px 28px; }
table { border-collapse: collapse; width: 100%; }
th, td { border-bottom: 1px solid var(--line); padding: 3px 10px; text-align: left; vertical-align: top; }
.number { text-align: right; white-space: nowrap; font-variant-numeric: tabular-nums; }
svg { width: 100%; height: auto; display: block; }
svg text { font: 11px ui-monospace, monospace; fill: var(--text); }
svg .name { text-anchor: end; } svg .tick { fill: var(--dim); }
svg .grid { stroke: var(--line); } svg .container { stroke: var(--text); stroke-dasharray: 4 3; }
svg .demand { fill: var(--demand); }
svg .prefetch { fill: var(--prefetch); }
svg .background { fill: var(--background); }
svg .mounting { fill: var(--mounting); }
svg .wait { fill: var(--wait); }
svg .urgent { stroke: var(--wait); stroke-width: 1; }
svg .failed { fill: var(--page); stroke: var(--wait); stroke-dasharray: 2 2; }
.key { display: inline-block; margin-right: 16px; }
.key::before { content: ""; display: inline-block; width: 14px; height: 9px; margin-right: 5px; }
.key.demand::before { background: var(--demand); } .key.prefetch::before { background: var(--prefetch); }
.key.background::before { background: var(--background); }
.key.mounting::before { background: var(--mounting); }
.key.wait::before { background: var(--wait); height: 5px; }
.key.urgent::before { outline: 1px solid var(--wait); }
.key.failed::before { outline: 1px dashed var(--wait); }
.key.container::before { width: 0; height: 12px; border-left: 1px dashed var(--text); }
"""
