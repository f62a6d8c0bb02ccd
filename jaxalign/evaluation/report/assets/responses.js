// Responses beside each other: at most four methods, a search, a filter, ten prompts at a time.
const [GOLD, PROXY, KL, LENGTH, CUT] = [2, 3, 4, 5, 6];  // places in a response
const STEP = 10;

function responses() {
  const sheet = byId('sheet');
  if (!sheet) return;
  const answers = data.responses.map(list => new Map(list.map(r => [r[0], r])));
  const place = {gold: GOLD, reward: PROXY}, judge = data.measures[0];
  const baseFor = i => baseOf(data.series[data.rows[i].series].run)?.best;
  let limit = STEP;

  // At first: the best method, the base of its run, and the next best that answer the same prompts.
  const worth = i => data.rows[i][judge] ?? -1e300, ranked = data.series.filter(x => !x.base).map(x => x.best);
  ranked.sort((a, b) => (worth(a) < worth(b)) - (worth(a) > worth(b)));
  const home = ranked.length ? baseFor(ranked[0]) : data.series[0].best;
  const shares = i => [...answers[i].keys()].some(p => answers[ranked[0]].has(p));
  const chosen = [...(home === undefined ? [] : [home]), ...ranked.filter(shares)].slice(0, 4);
  const narrow = window.matchMedia('(max-width: 40rem)');
  const count = Math.min(4, data.rows.length), picks = [];
  for (let k = 0; k < count; k++) {
    const group = data.series.map(series => h('optgroup', {label: series.name}, series.rows.map(i => h('option', {value: i}, rowName(i)))));
    const start = k < (narrow.matches ? 2 : 4) && chosen[k] !== undefined ? chosen[k] : '';
    const select = h('select', {'aria-label': `Method ${k + 1} of ${count}`, onchange: () => { limit = STEP; draw(); }}, h('option', {value: ''}, '(none)'), group);
    select.value = start;
    picks.push(select);
  }
  byId('columns').append(...picks.map(select => h('label', {}, select)));

  const search = byId('search'), filter = byId('filter');
  const columns = () => picks.map(p => p.value).filter(v => v !== '').map(Number);
  const passes = (prompt, i) => {
    const own = answers[i].get(prompt), home = baseFor(i), base = home === undefined ? undefined : answers[home].get(prompt);
    if (!own) return false;
    if (filter.value === 'cut') return own[CUT] === 1;
    if (!base || i === home) return false;
    if (filter.value === 'worse') return own[place[judge]] < base[place[judge]];
    return own[GOLD] < base[GOLD] && own[PROXY] > base[PROXY];
  };

  function draw() {
    const wanted = search.value.trim().toLowerCase(), cols = columns();
    const found = data.prompts.map((_, p) => p).filter(p => {
      if (!cols.some(i => answers[i].has(p))) return false;
      const texts = [data.prompts[p], ...cols.map(i => answers[i].get(p)?.[1] ?? '')];
      return (!wanted || texts.some(t => t.toLowerCase().includes(wanted))) && (!filter.value || cols.some(i => passes(p, i)));
    });
    byId('found').textContent = cols.length ? `${found.length} of ${data.prompts.length} prompts` : 'No method is chosen.';
    for (const holder of [byId('columns'), sheet]) holder.style.setProperty('--n', holder === sheet ? Math.max(cols.length, 1) : count);
    sheet.replaceChildren(...found.slice(0, limit).map(p => h('article', {},
      h('h3', data.prompts[p].length > 900 ? {class: 'long', tabindex: 0} : {}, wanted ? marked(data.prompts[p], wanted) : templated(data.prompts[p])),
      h('div', {class: 'sheet'}, cols.map(i => cell(i, answers[i].get(p), wanted))))));
    byId('more').hidden = found.length <= limit;
    byId('more').textContent = `Show ${Math.min(STEP, found.length - limit)} more`;
  }

  function cell(i, own, wanted) {
    const who = h('span', {class: 'who'}, h('span', {class: 'mark'}, markSvg(data.rows[i].series)), rowName(i));
    if (!own) return h('div', {class: 'cell'}, h('p', {class: 'empty'}, 'no response'), h('div', {class: 'under'}, who));
    const text = own[1] ? h('p', own[1].length > 900 ? {class: 'long', tabindex: 0} : {}, marked(own[1], wanted)) : h('p', {class: 'empty'}, 'empty');
    const numbers = data.measures.filter(m => own[place[m]] !== null).flatMap((m, k) => {
      const value = num(own[place[m]]);
      return [k ? ' · ' : '', h('span', {class: 'one'}, `${WORDS[m]} `, k ? value : h('b', {}, value))];
    });
    const more = [numbers.length ? ' · ' : '', h('span', {class: 'one', title: `${own[LENGTH]} tokens`}, `KL ${num(own[KL], 1)}`), own[CUT] ? ' · cut' : ''];
    return h('div', {class: 'cell'}, text, h('div', {class: 'under'}, who), h('div', {class: 'under'}, numbers, more));
  }

  search.addEventListener('input', () => { limit = STEP; draw(); });
  filter.addEventListener('change', () => { limit = STEP; draw(); });
  byId('more').addEventListener('click', () => {
    const before = limit;
    limit += STEP;
    draw();
    const next = sheet.children[before];
    if (next) { next.setAttribute('tabindex', '-1'); next.focus({preventScroll: true}); }
  });
  byId('columns').classList.add('sheet');
  draw();
}

// A prompt whose template's marks, as <|im_start|>user, stand back.
const templated = text => text.split(/(<\|[^|<>\n]{1,40}\|>(?:system|user|assistant)?)/).map((part, i) => i % 2 ? h('span', {class: 'role'}, part) : part);

// The text with what was searched for in <mark>.
function marked(text, wanted) {
  if (!wanted) return [text];
  const out = [], lower = text.toLowerCase();
  if (lower.length !== text.length) return [text];  // some letters change their length: nothing is marked
  let at = 0;
  for (let i = lower.indexOf(wanted); i >= 0; i = lower.indexOf(wanted, at)) {
    out.push(text.slice(at, i), h('mark', {}, text.slice(i, i + wanted.length)));
    at = i + wanted.length;
  }
  return [...out, text.slice(at)];
}
