// A figure: lines with intervals over two axes. Drawn at the width it has, so that text keeps its size on a phone.
const logScale = v => Math.log2(1 + Math.max(v, 0));  // of KL: linear below a nat, logarithmic above

function niceTicks(low, high, count) {
  const raw = (high - low) / count, power = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 2.5, 5, 10].map(m => m * power).find(m => m >= raw * .999);
  const out = [];
  for (let i = Math.ceil(low / step - 1e-9); i * step <= high + step * 1e-6; i++) out.push(i * step);
  return out;
}
function klTicks(high, width) {  // as many as have 34 pixels each
  let last = -Infinity;
  return [0, .5, 1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024].filter(t => {
    const at = logScale(t) / logScale(high) * width;
    if (t > high || at - last < 34) return false;
    last = at;
    return true;
  });
}
function short(v) {
  const a = Math.abs(v);
  if (a >= 1e6) return `${+(v / 1e6).toPrecision(3)}M`.replace('-', '−');
  if (a >= 1e4) return `${+(v / 1e3).toPrecision(3)}k`.replace('-', '−');
  if (a && a < 1e-3) return v.toExponential(0).replace('-', '−');
  return String(+v.toPrecision(4)).replace('-', '−');
}

// lines: [{series, label, points: [{x, y, ex, ey, tip: [..], label}], dashed, plain}]. base: the value of a dotted line.
function chart(holder, {title, lines, xLabel, yLabel, kl, height, base, marks = true, describe}) {
  const width = Math.max(150, Math.round(holder.clientWidth || 320)), tall = height || Math.round(Math.min(400, Math.max(270, width * .72)));
  const small = tall < 200, box = {l: 0, r: 10, t: title ? 26 : 10, b: xLabel ? 40 : 24};
  const points = lines.flatMap(line => line.points.map(p => ({...p, series: line.series})));
  const svg = s('svg', {class: 'chart', viewBox: `0 0 ${width} ${tall}`, role: 'group', 'aria-label': describe || title});
  if (title) svg.append(s('text', {class: 'title', x: 0, y: 13}, title));
  holder.replaceChildren(svg);
  if (!points.length) {
    svg.append(s('text', {x: width / 2, y: tall / 2, 'text-anchor': 'middle'}, 'every method is hidden'));
    return svg;
  }
  const f = kl ? logScale : v => v, ys = points.flatMap(p => [p.y - (p.ey || 0), p.y + (p.ey || 0)]);
  if (base !== undefined) ys.push(base);
  let [y0, y1] = [Math.min(...ys), Math.max(...ys)];
  if (y1 - y0 < 1e-12) { y0 -= Math.abs(y0) * .1 + .5; y1 += Math.abs(y1) * .1 + .5; }
  [y0, y1] = [y0 - (y1 - y0) * .06, y1 + (y1 - y0) * .06];
  const yTicks = niceTicks(y0, y1, small ? 3 : 5);
  box.l = Math.max(...yTicks.map(t => short(t).length), 2) * 7 + 14;
  const xs = points.map(p => p.x), x0 = kl ? -.06 * f(Math.max(...xs, .5)) : Math.min(...xs);
  const x1 = kl ? f(Math.max(...xs, .5)) * 1.04 : Math.max(Math.max(...xs), x0 + 1e-9);
  const px = v => box.l + (f(v) - x0) / (x1 - x0) * (width - box.l - box.r);
  const py = v => tall - box.b - (v - y0) / (y1 - y0) * (tall - box.b - box.t);

  for (const t of yTicks) {
    svg.append(s('line', {class: 'gridline', x1: box.l, x2: width - box.r, y1: py(t), y2: py(t)}));
    svg.append(s('text', {x: box.l - 8, y: py(t) + 4, 'text-anchor': 'end'}, short(t)));
  }
  const xTicks = kl ? klTicks(Math.max(...xs, .5) * 1.02, width - box.l) : niceTicks(x0, x1, Math.max(3, Math.floor(width / 80))).filter(Number.isInteger);
  for (const t of xTicks) svg.append(s('text', {x: px(t), y: tall - box.b + 16, 'text-anchor': 'middle'}, short(t)));
  if (xLabel) svg.append(s('text', {x: (box.l + width - box.r) / 2, y: tall - 4, 'text-anchor': 'middle'}, xLabel));
  if (yLabel) svg.append(s('text', {x: width - box.r, y: 13, 'text-anchor': 'end'}, yLabel));
  if (base !== undefined) svg.append(s('line', {class: 'zero', x1: box.l, x2: width - box.r, y1: py(base), y2: py(base)}));

  for (const line of lines) {
    const ink = line.plain ? 'var(--link)' : colour(line.series);
    const g = s('g', {class: 'series', 'data-series': line.series});
    const d = line.points.map((p, i) => `${i ? 'L' : 'M'}${px(p.x).toFixed(1)},${py(p.y).toFixed(1)}`).join('');
    if (line.points.length > 1) g.append(s('path', {class: 'line', d, stroke: ink, 'stroke-dasharray': line.dashed || null}));
    for (const p of line.points) {
      const [x, y] = [px(p.x), py(p.y)];
      if (p.ey) g.append(s('line', {class: 'whisker', stroke: ink, x1: x, x2: x, y1: py(p.y - p.ey), y2: py(p.y + p.ey)}));
      if (p.ex) g.append(s('line', {class: 'whisker', stroke: ink, y1: y, y2: y, x1: px(Math.max(p.x - p.ex, 0)), x2: px(p.x + p.ex)}));
    }
    if (marks) for (const p of line.points) {
      const m = markPath(line.series, small ? 3.2 : 4.2);
      m.setAttribute('transform', `translate(${px(p.x).toFixed(1)},${py(p.y).toFixed(1)})`);
      g.append(m);
    }
    svg.append(g);
  }
  explore(svg, points.map(p => ({...p, px: px(p.x), py: py(p.y)})), {width, marks});
  return svg;
}

// The nearest point shows its numbers under a pointer; the arrow keys go from point to point.
function explore(svg, points, {width, marks}) {
  points.sort((a, b) => a.px - b.px || a.py - b.py);
  const ring = s('circle', {class: 'ring', r: 8, visibility: 'hidden'});
  svg.append(ring);
  let now = -1;
  const scale = () => svg.getBoundingClientRect().width / width;
  const leave = () => { now = -1; ring.setAttribute('visibility', 'hidden'); svg.classList.remove('dim'); hideTip(); };
  function go(i) {
    now = i;
    const p = points[i], rect = svg.getBoundingClientRect();
    for (const [name, value] of [['cx', p.px], ['cy', p.py], ['visibility', 'visible']]) ring.setAttribute(name, value);
    if (marks) light(svg, p.series);
    showTip(rect.left + p.px * scale(), rect.top + p.py * scale(), ...p.tip());
  }
  svg.addEventListener('pointermove', event => {
    const rect = svg.getBoundingClientRect(), x = (event.clientX - rect.left) / scale(), y = (event.clientY - rect.top) / scale();
    let best = -1, near = marks ? 28 * 28 : Infinity;
    points.forEach((p, i) => { const d = (p.px - x) ** 2 + (marks ? (p.py - y) ** 2 : 0); if (d < near) [best, near] = [i, d]; });
    if (best < 0) leave(); else if (best !== now) go(best);
  });
  svg.addEventListener('pointerleave', leave);
  svg.addEventListener('blur', leave);
  svg.setAttribute('tabindex', '0');
  svg.setAttribute('aria-description', 'Arrow keys go from point to point; the numbers are in the table below.');
  svg.addEventListener('keydown', event => {
    const step = {ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1}[event.key];
    if (event.key === 'Escape') leave();
    if (!step) return;
    event.preventDefault();
    go((now + step + points.length) % points.length);
  });
}
function light(svg, series) {
  svg.classList.toggle('dim', series !== null);
  for (const g of all('g.series', svg)) g.classList.toggle('lit', g.dataset.series === String(series));
}
