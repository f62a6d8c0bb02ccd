// Elements are made here alone, and text enters them as text: nothing of a run is read as markup.
const SVG = 'http://www.w3.org/2000/svg';

function fill(node, attributes, children) {
  for (const [name, value] of Object.entries(attributes || {})) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith('on')) node.addEventListener(name.slice(2), value);
    else node.setAttribute(name, value === true ? '' : value);
  }
  for (const child of children.flat()) if (child !== null && child !== undefined) node.append(child);
  return node;
}
const h = (name, attributes, ...children) => fill(document.createElement(name), attributes, children);
const s = (name, attributes, ...children) => fill(document.createElementNS(SVG, name), attributes, children);
const byId = id => document.getElementById(id);
const all = (selector, root = document) => [...root.querySelectorAll(selector)];

const data = JSON.parse(byId('data').textContent);
const WORDS = {gold: 'gold', reward: 'proxy'};
const hidden = new Set();  // numbers of series
const listeners = [];  // called when a method is hidden or shown

function num(value, digits = 2) {
  if (value === null || value === undefined) return '–';
  const text = value.toLocaleString('en-US', {minimumFractionDigits: digits, maximumFractionDigits: digits});
  return (Number(text.replace(/,/g, '')) === 0 ? text.replace('-', '') : text).replace('-', '−');
}
const pm = (row, name) => num(row[name]) + (row[name + '_95'] == null ? '' : ` ± ${num(row[name + '_95'])}`);
const baseOf = run => data.series.find(x => x.base && x.run === run);
const rowName = i => data.series[data.rows[i].series].name + (data.rows[i].setting ? `, ${data.rows[i].setting}` : '');

// Colours and marks -------------------------------------------------------------------------------------------------
// Eight colours told apart by the colour-blind; the second eight methods have other marks, hollow, and dashed lines.
const styleOf = j => data.series[j].style;
const colour = j => styleOf(j) < 0 ? 'var(--ink)' : `var(--c${styleOf(j) % 8})`;
const hollow = j => styleOf(j) >= 0 && Math.floor(styleOf(j) / 8) % 2 === 1;
const dash = j => hollow(j) ? '5 3' : null;

const polygon = (n, r, turn) => Array.from({length: n}, (_, i) => {
  const angle = turn + 2 * Math.PI * i / n;
  return `${(r * Math.sin(angle)).toFixed(2)},${(-r * Math.cos(angle)).toFixed(2)}`;
}).join('L');
const star = r => Array.from({length: 10}, (_, i) => {
  const angle = Math.PI * i / 5, q = i % 2 ? r * .45 : r;
  return `${(q * Math.sin(angle)).toFixed(2)},${(-q * Math.cos(angle)).toFixed(2)}`;
}).join('L');
const SHAPES = [
  r => `M${-r},0a${r},${r} 0 1,0 ${2 * r},0a${r},${r} 0 1,0 ${-2 * r},0Z`,
  r => `M${polygon(3, r * 1.25, 0)}Z`,
  r => `M${polygon(4, r * 1.15, Math.PI / 4)}Z`,
  r => `M${polygon(4, r * 1.25, 0)}Z`,
  r => `M${polygon(3, r * 1.25, Math.PI)}Z`,
  r => `M${star(r * 1.35)}Z`,
  r => `M${polygon(6, r * 1.1, 0)}Z`,
  r => `M${polygon(5, r * 1.15, 0)}Z`,
];
function shape(j, r = 4.5) {
  if (styleOf(j) < 0) return `M${-r * 1.3},0H${r * 1.3}M0,${-r * 1.3}V${r * 1.3}`;
  return SHAPES[(styleOf(j) + 3 * Math.floor(styleOf(j) / 8)) % 8](r);
}
const markPath = (j, r) => s('path', {
  class: 'point', d: shape(j, r), stroke: colour(j), 'stroke-width': styleOf(j) < 0 ? 2.4 : 1.4,
  fill: hollow(j) ? 'var(--paper)' : colour(j),
});
const markSvg = j => s('svg', {width: 14, height: 14, viewBox: '-7 -7 14 14', 'aria-hidden': 'true'}, markPath(j, 4.4));

// The tip ------------------------------------------------------------------------------------------------------------
const tip = byId('tip');
function showTip(x, y, ...content) {
  tip.replaceChildren(...content);
  tip.hidden = false;
  const box = tip.getBoundingClientRect(), width = document.documentElement.clientWidth;
  tip.style.left = `${Math.max(8, Math.min(x + 14, width - box.width - 8))}px`;
  tip.style.top = `${y + 18 + box.height > window.innerHeight ? Math.max(8, y - box.height - 14) : y + 18}px`;
}
const hideTip = () => { tip.hidden = true; };
