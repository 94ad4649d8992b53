// Draws the charts that the page describes in its application/json elements.
"use strict";
(() => {
  const DASHES = [[], [6, 3], [2, 2], [8, 3, 2, 3]];
  const POINTS = ["circle", "rect", "triangle", "rectRot", "star", "crossRot", "cross"];
  const color = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  const number = (value) => Math.abs(value) >= 1e4 || (value && Math.abs(value) < 1e-3)
    ? value.toExponential(1) : String(+value.toPrecision(4));
  const compact = new Intl.NumberFormat("en", { notation: "compact", maximumFractionDigits: 1 });
  const shown = (value, percent) => percent ? `${+(100 * value).toPrecision(4)}%` : number(value);
  // A long label on several lines, broken between words
  const lines = (label, width) => label.split(" ").reduce((found, word) => {
    const last = found.length - 1;
    if (last >= 0 && found[last].length + word.length < width) found[last] += ` ${word}`;
    else found.push(word);
    return found;
  }, []);

  // Intervals of bars and points: a line from low to high with a cap at both ends
  const intervals = {
    id: "intervals",
    afterDatasetsDraw(chart) {
      const { ctx, scales, options } = chart;
      const lying = options.indexAxis === "y";
      const axis = lying ? scales.x : scales.y;
      chart.data.datasets.forEach((set, which) => (set.intervals || []).forEach((pair, at) => {
        const mark = chart.getDatasetMeta(which).data[at];
        if (!pair || !mark || !chart.isDatasetVisible(which)) return;
        const [low, high] = pair.map((value) => axis.getPixelForValue(value));
        const line = (a, b, c, d) => {
          ctx.moveTo(...(lying ? [a, b] : [b, a]));
          ctx.lineTo(...(lying ? [c, d] : [d, c]));
        };
        const middle = lying ? mark.y : mark.x;
        ctx.save();
        ctx.strokeStyle = lying ? color("--ink") : set.borderColor;
        ctx.lineWidth = 1.5;
        ctx.beginPath();
        line(low, middle, high, middle);
        for (const end of [low, high]) line(end, middle - 3, end, middle + 3);
        ctx.stroke();
        ctx.restore();
      }));
    },
  };

  const dataset = (spec, series, at) => {
    const paint = color(`--c${series.color ?? at + 1}`);
    const common = { label: series.name, borderColor: paint, intervals: series.intervals };
    if (spec.kind === "bars") return { ...common, data: series.values, backgroundColor: paint };
    const points = series.points.map(([x, y, label]) => ({ x, y, label }));
    return {
      ...common, data: points, borderWidth: 2, backgroundColor: paint, spanGaps: false,
      borderDash: series.dash ? DASHES[series.dash % DASHES.length] : [],
      pointStyle: POINTS[at % POINTS.length], showLine: spec.kind !== "points",
      pointRadius: spec.kind === "points" ? 6 : points.length > 40 ? 0 : 3, pointHitRadius: 8,
    };
  };

  // Room for the intervals, which Chart.js does not know of
  const reach = (spec) => {
    const ends = spec.series.flatMap((series) => series.intervals.filter(Boolean).flat());
    return ends.length ? { suggestedMin: Math.min(...ends), suggestedMax: Math.max(...ends) } : {};
  };

  const axis = (spec, title, percent, values) => ({
    title: { display: Boolean(title), text: title, color: color("--faint") },
    grid: { color: color("--line") }, border: { color: color("--line") },
    beginAtZero: values && spec.zero, ...(values ? reach(spec) : {}),
    ticks: { color: color("--faint"), maxTicksLimit: 7, maxRotation: 0,
      callback: (value) => shown(value, percent) },
  });

  // A label for as many round values as have room: all, their 1, 2, 5 fold, or powers of ten
  const logLabel = (spec) => {
    const values = spec.series.flatMap((series) => series.points.map(([x]) => x));
    const decades = Math.log10(Math.max(...values) / Math.min(...values));
    const wanted = decades < 1 ? [1, 2, 3, 4, 5, 6, 8] : decades < 3 ? [1, 2, 5] : [1];
    const lead = (value) => value / 10 ** Math.floor(Math.log10(value) + 1e-9);
    return (value) => wanted.includes(+lead(value).toFixed(6)) ? compact.format(value) : null;
  };

  const config = (spec) => {
    const bars = spec.kind === "bars";
    const value = axis(spec, spec.y, spec.percent, true);
    const labels = { ...axis(spec, "", false), type: "category", grid: { display: false } };
    const width = window.innerWidth < 500 ? 16 : 26;
    labels.ticks = { color: color("--ink"), autoSkip: false,
      callback(at) { return lines(this.getLabelForValue(at), width); } };
    const other = { ...axis(spec, spec.x, spec.percent_x), type: spec.log ? "logarithmic" : "linear" };
    if (spec.log) other.ticks = { ...other.ticks, autoSkip: false, callback: logLabel(spec) };
    const tip = (item) => {
      const set = item.dataset, raw = item.raw, pair = (set.intervals || [])[item.dataIndex];
      const text = shown(bars ? raw : raw.y, spec.percent);
      const range = pair ? ` (${pair.map((v) => shown(v, spec.percent)).join(" to ")})` : "";
      return `${raw.label || set.label}: ${text}${range}`;
    };
    const heading = (items) => bars ? items[0].label : `${spec.x} ${shown(items[0].raw.x, spec.percent_x)}`;
    return {
      type: bars ? "bar" : spec.kind === "points" ? "scatter" : "line",
      data: { labels: spec.labels, datasets: spec.series.map((s, at) => dataset(spec, s, at)) },
      plugins: [intervals],
      options: {
        animation: false, responsive: true, maintainAspectRatio: false,
        // Unparsed points are taken to be in order, which those of a path are not
        parsing: spec.kind === "lines" ? false : undefined,
        indexAxis: bars ? "y" : "x",
        interaction: { mode: spec.kind === "lines" ? "index" : "nearest", intersect: false },
        scales: bars ? { x: value, y: labels } : { x: other, y: value },
        plugins: {
          legend: { display: spec.series.length > 1, position: "bottom",
            labels: { color: color("--ink"), usePointStyle: !bars, boxWidth: 12, boxHeight: 8,
              pointStyleWidth: 12 } },
          tooltip: { callbacks: { label: tip, title: heading } },
        },
      },
    };
  };

  const drawn = [];
  const draw = () => {
    drawn.splice(0).forEach((chart) => chart.destroy());
    Chart.defaults.font.family = "system-ui, sans-serif";
    for (const element of document.querySelectorAll("script.chart-data")) {
      const canvas = document.getElementById(element.dataset.canvas);
      drawn.push(new Chart(canvas, config(JSON.parse(element.textContent))));
    }
  };
  draw();
  window.matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
})();
