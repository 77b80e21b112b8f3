// The numbers under the pointer: of each line, its point that is nearest to the pointer's step.
for (const plot of document.querySelectorAll(".plot")) {
  const chart = JSON.parse(plot.dataset.chart);
  if (!chart.lines.length) continue;
  const cursor = plot.appendChild(document.createElement("div"));
  const tip = plot.appendChild(document.createElement("div"));
  cursor.className = "cursor";
  tip.className = "tip";
  const hide = () => { cursor.hidden = tip.hidden = true; };
  const written = (value) =>
    Math.abs(value) >= 1000 ? Math.round(value).toLocaleString("en")
      : value && Math.abs(value) < 0.001 ? value.toExponential(3) : `${+value.toPrecision(4)}`;
  const nearest = (points, x) =>
    points.reduce((best, point) => (Math.abs(point[0] - x) < Math.abs(best[0] - x) ? point : best));
  const move = (event) => {
    const box = plot.getBoundingClientRect();
    const share = Math.min(1, Math.max(0, (event.clientX - box.left) / box.width));
    const x = nearest(chart.lines[0].points, chart.from + share * (chart.to - chart.from))[0];
    const place = (x - chart.from) / (chart.to - chart.from);
    tip.replaceChildren(`${plot.dataset.x} ${x.toLocaleString("en")}`);
    for (const line of chart.lines) {
      const [step, value] = nearest(line.points, x);
      const row = tip.appendChild(document.createElement("div"));
      const number = row.appendChild(document.createElement("b"));
      number.className = `c${line.color % 8}`;
      number.textContent = written(value);
      row.append(` ${line.name}` + (step === x ? "" : ` at ${step.toLocaleString("en")}`));
    }
    cursor.style.left = `${place * 100}%`;
    tip.style.left = place < 0.5 ? `calc(${place * 100}% + 8px)` : "";
    tip.style.right = place < 0.5 ? "" : `calc(${(1 - place) * 100}% + 8px)`;
    cursor.hidden = tip.hidden = false;
  };
  hide();
  plot.addEventListener("pointermove", move);
  plot.addEventListener("pointerdown", move);
  plot.addEventListener("pointerleave", hide);
}
