"""The drawing of the overlap in the documentation: `python -m tests.helpers.overlap docs/overlap.svg`.

Each timeline is computed by the rules of its mode from one set of durations, which are made up: superoffload's as in
`superoffload/offload/trainer/coordinator.py`, zerooffload's as in `deepspeed/runtime/zero/stage3.py`.
"""

import sys
from dataclasses import dataclass, field
from html import escape
from pathlib import Path

SUB_GROUPS = range(1, 7)
FORWARD, BACKWARD, DOWN, SPECULATE, STEP, COMMIT, UP, NORM = 1.1, 2.2, 0.7, 1.7, 1.9, 1.0, 0.4, 0.4

DEVICE, TO_HOST, TO_DEVICE, HOST = "device", "copies to host", "copies to device", "Adam on the host"
LANES = (DEVICE, TO_HOST, TO_DEVICE, HOST)
LEFT, TOP, SCALE, LANE, GAP, PANEL = 132, 16, 19.4, 22, 5, 168
LEGEND = (
    ("forward", "forward"),
    ("backward", "backward"),
    ("gradient", "gradients"),
    ("weights", "new weights"),
    ("speculate", "new weights, computed ahead"),
    ("ignored", "the same, ignored"),
    ("step", "Adam, in place"),
    ("commit", "Adam of the last step, in place"),
    ("idle", "the device waits"),
)
STYLE = """
text { font: 13px system-ui, "Segoe UI", Helvetica, Arial, sans-serif; fill: #1f2328 }
.title { font-weight: 600; font-size: 14px } .note, .lane { fill: #59636e; font-size: 12px }
.bg { fill: #ffffff } .track { fill: #f2f4f7 } .mark { stroke: #1f2328; stroke-dasharray: 3 3 }
.number { fill: #ffffff; font-size: 11px; text-anchor: middle }
.forward { fill: #3b6fc4 } .backward { fill: #24478a } .gradient { fill: #a8620b } .weights { fill: #0b7f78 }
.speculate { fill: #7a4fc0 } .commit { fill: #2f7d3b } .step { fill: #b23a48 }
.ignored { fill: none; stroke: #7a4fc0; stroke-dasharray: 3 2 } .idle { fill: none; stroke: #b23a48 }
.number.of-ignored { fill: #7a4fc0 }
@media (prefers-color-scheme: dark) {
text { fill: #e6edf3 } .note, .lane { fill: #9aa6b2 } .bg { fill: #0d1117 } .track { fill: #1b222c }
.mark { stroke: #e6edf3 } .number { fill: #ffffff } .ignored { stroke: #b79aee } .number.of-ignored { fill: #b79aee }
.idle { stroke: #ff8a95 }
}
"""


@dataclass
class Timeline:
    """The blocks of one step and the forward after it: lane, start, end, kind, sub-group."""

    title: str
    note: str
    blocks: list[tuple[str, float, float, str, int]] = field(default_factory=list)
    norm_at: float = 0.0
    free_at: dict[str, float] = field(default_factory=lambda: dict.fromkeys(LANES, 0.0))

    def add(self, lane: str, kind: str, sub_group: int, duration: float, ready_at: float = 0.0) -> float:
        """Add a block as soon as its lane is free and what it needs is ready; return its end."""
        start = max(self.free_at[lane], ready_at)
        self.blocks.append((lane, start, start + duration, kind, sub_group))
        self.free_at[lane] = start + duration
        return start + duration

    def wait(self, until: float) -> None:
        """Let the device wait, visibly if that is not too short to see."""
        if until - self.free_at[DEVICE] > 0.2:
            self.blocks.append((DEVICE, self.free_at[DEVICE], until, "idle", 0))
        self.free_at[DEVICE] = max(self.free_at[DEVICE], until)

    def next_forward(self, there: dict[int, float], from_: float) -> None:
        """Run the next forward: a layer needs the new weights of its sub-group."""
        for group in SUB_GROUPS:
            self.wait(max(there[group], from_))
            self.add(DEVICE, "forward", group, FORWARD)


def superoffload(title: str, note: str, clipped: bool) -> Timeline:
    """Compute a step of superoffload whose predecessor was not clipped."""
    line = Timeline(title, note)
    for group in reversed(SUB_GROUPS):
        line.add(HOST, "commit", group, COMMIT)
    for group in SUB_GROUPS:
        line.add(DEVICE, "forward", group, FORWARD)
    speculated = {}
    for group in reversed(SUB_GROUPS):
        arrived = line.add(TO_HOST, "gradient", group, DOWN, line.add(DEVICE, "backward", group, BACKWARD))
        speculated[group] = line.add(HOST, "speculate", group, SPECULATE, arrived)
    line.norm_at = line.free_at[TO_HOST] + NORM
    there = {}
    if clipped:
        begun = [block for block in line.blocks if block[3] != "speculate" or block[1] < line.norm_at]
        line.blocks = [(*block[:3], "ignored", block[4]) if block[3] == "speculate" else block for block in begun]
        for group in SUB_GROUPS:
            line.free_at[HOST] = max(line.norm_at, line.free_at[HOST])
            there[group] = line.add(TO_DEVICE, "weights", group, UP, line.add(HOST, "step", group, STEP))
        line.next_forward(there, max(end for lane, _, end, kind, _ in line.blocks if kind == "step"))
        return line
    for group in sorted(SUB_GROUPS, key=lambda group: (max(speculated[group], line.norm_at), group)):
        there[group] = line.add(TO_DEVICE, "weights", group, UP, max(speculated[group], line.norm_at))
    line.next_forward(there, max(speculated.values()))
    for group in reversed(SUB_GROUPS):
        line.add(HOST, "commit", group, COMMIT)
    return line


def zerooffload(title: str, note: str) -> Timeline:
    """Compute a step of ZeRO-Offload, clipped or not."""
    line = Timeline(title, note)
    for group in SUB_GROUPS:
        line.add(DEVICE, "forward", group, FORWARD)
    for group in reversed(SUB_GROUPS):
        line.wait(line.add(TO_HOST, "gradient", group, DOWN, line.add(DEVICE, "backward", group, BACKWARD)))
    line.norm_at = line.free_at[TO_HOST] + NORM
    there, ready_at = {}, line.norm_at
    for group in SUB_GROUPS:
        there[group] = ready_at = line.add(
            TO_DEVICE, "weights", group, UP, line.add(HOST, "step", group, STEP, ready_at)
        )
    line.next_forward(there, ready_at)
    return line


def timelines() -> list[Timeline]:
    """Compute what the drawing shows."""
    return [
        superoffload(
            "superoffload: the gradient norm is below the threshold",
            "What was computed ahead is accepted. Only the last sub-group is not hidden.",
            clipped=False,
        ),
        superoffload(
            "superoffload: the gradient is clipped",
            "What was computed ahead is ignored. Every sub-group is stepped with the clipped gradient.",
            clipped=True,
        ),
        zerooffload("zerooffload: every step", "Copies and Adam run while the device waits."),
    ]


def draw() -> str:
    """Return the drawing as SVG."""
    lines = timelines()
    width = LEFT + round(max(end for line in lines for _, _, end, _, _ in line.blocks) * SCALE) + 24
    parts = []
    for number, line in enumerate(lines):
        parts += _panel(line, TOP + number * PANEL, width)
    top = TOP + len(lines) * PANEL
    parts += _legend(top)
    height = top + 114
    about = "Timelines of a step: superoffload, superoffload with a clipped gradient, zerooffload"
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img" aria-label="{about}">\n'
        f"<style>{STYLE}</style>\n"
        f'<rect class="bg" width="{width}" height="{height}" rx="8"/>\n' + "\n".join(parts) + "\n</svg>\n"
    )


def _panel(line: Timeline, top: float, width: int) -> list[str]:
    parts = [
        f'<text class="title" x="16" y="{top + 12}">{escape(line.title)}</text>',
        f'<text class="note" x="{width - 16}" y="{top + 12}" text-anchor="end">{escape(line.note)}</text>',
    ]
    heights = {lane: top + 24 + row * (LANE + GAP) for row, lane in enumerate(LANES)}
    for lane, y in heights.items():
        parts.append(f'<text class="lane" x="16" y="{y + 15}">{lane}</text>')
        parts.append(f'<rect class="track" x="{LEFT}" y="{y}" width="{width - LEFT - 16}" height="{LANE}" rx="3"/>')
    for lane, start, end, kind, group in line.blocks:
        x, size = LEFT + start * SCALE, (end - start) * SCALE
        inset = 0.75 if kind in ("ignored", "idle") else 0.5
        parts.append(
            f'<rect class="{kind}" x="{x + inset:.1f}" y="{heights[lane] + inset}" width="{size - 2 * inset:.1f}" '
            f'height="{LANE - 2 * inset}" rx="2"/>'
        )
        if group and size > 10:
            of = " of-ignored" if kind == "ignored" else ""
            parts.append(f'<text class="number{of}" x="{x + size / 2:.1f}" y="{heights[lane] + 15}">{group}</text>')
    x = LEFT + line.norm_at * SCALE
    bottom = top + 24 + len(LANES) * (LANE + GAP)
    parts.append(f'<line class="mark" x1="{x:.1f}" x2="{x:.1f}" y1="{top + 22}" y2="{bottom}"/>')
    parts.append(f'<text class="note" x="{x:.1f}" y="{bottom + 10}" text-anchor="middle">norm known</text>')
    return parts


def _legend(top: float) -> list[str]:
    parts = []
    for number, (kind, words) in enumerate(LEGEND):
        x, y = 16 + number % 4 * 232, top + 8 + number // 4 * 24
        parts.append(f'<rect class="{kind}" x="{x}" y="{y}" width="14" height="14" rx="2"/>')
        parts.append(f'<text class="note" x="{x + 20}" y="{y + 11.5}">{words}</text>')
    parts.append(
        f'<text class="note" x="16" y="{top + 98}">Numbers are sub-groups, 1 with the first layers. Time runs to the '
        "right; the widths are made up. The forward at the right is that of the next step.</text>"
    )
    return parts


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(draw(), encoding="utf-8")
