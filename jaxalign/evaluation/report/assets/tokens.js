// A response token by token: coloured by KL, Q, reward or log-ratio, with the candidates of each place.
const COLOURS = {
  kl: ['KL of the step', 'The exact KL of the next-token distribution to the base\'s [nats]: where the method departs from the base.', t => t.kl],
  q: ['Q', 'The score by which the base is tilted, less its mean under the base [units of reward].', t => t.q],
  reward: ['reward gained', 'What the token adds to the proxy of the text so far.', t => t.gain],
  ratio: ['log-ratio', 'The token\'s log-probability under the method less that under the base [nats].', t => t.log_prob === null ? null : t.log_prob - t.log_prob_ref],
  surprise: ['surprisal', 'The token\'s −log-probability under the base [nats].', t => -t.log_prob_ref],
};

function tokenView() {
  const holder = byId('token-text');
  if (!holder) return;
  const response = byId('token-response'), prompt = byId('token-prompt'), colours = byId('token-colour');
  for (const line of data.tokens) line.tokens.forEach((t, i) => {
    const before = i ? line.tokens[i - 1].reward : line.before;
    t.gain = t.reward == null || before == null ? null : t.reward - before;
  });
  const option = (value, words) => h('option', {value}, words);
  const rows = [...new Set(data.tokens.map(t => t.row))];
  response.append(...rows.map(i => option(i, rowName(i))));
  const judge = data.measures[0], worth = i => (data.series[data.rows[i].series].base ? -1e9 : 0) + (data.rows[i][judge] ?? -1e6);
  response.value = [...rows].sort((a, b) => worth(b) - worth(a))[0];
  const current = () => data.tokens.find(t => t.row === Number(response.value) && t.prompt === Number(prompt.value));

  function fillPrompts() {
    const before = prompt.value, own = data.tokens.filter(t => t.row === Number(response.value));
    prompt.replaceChildren(...own.map(t => option(t.prompt, clip(data.prompts[t.prompt], 60))));
    if (own.some(t => String(t.prompt) === before)) prompt.value = before;
    fillColours();
  }
  function fillColours() {
    const before = colours.value, tokens = current().tokens;
    const usable = Object.keys(COLOURS).filter(name => tokens.some(t => Math.abs(COLOURS[name][2](t) ?? 0) > 1e-6));
    colours.replaceChildren(...usable.map(name => option(name, COLOURS[name][0])));
    if (usable.includes(before)) colours.value = before;
    draw();
  }
  function draw() {
    const line = current(), [title, words, of] = COLOURS[colours.value] || COLOURS.surprise;
    const values = line.tokens.map(of), most = Math.max(...values.map(v => Math.abs(v ?? 0)), 1e-9);
    byId('token-hint').textContent = `${words} Point at a token, or go to it with the arrow keys, to see the candidates of its place.`;
    const spans = line.tokens.map((t, i) => {
      const value = values[i] ?? 0, text = t.text === '' ? '∅' : t.text;
      const span = h('span', {
        class: `${value < 0 ? 'down' : 'up'}${t.special ? ' special' : ''}`, tabindex: i ? -1 : 0, role: 'listitem',
        'aria-label': `${text}: ${title} ${num(values[i])}`,
      }, text.replace(/\n/g, '↵\n'));
      span.style.setProperty('--w', `${Math.round(70 * Math.abs(value) / most)}%`);
      const show = () => { const box = span.getBoundingClientRect(); showTip(box.left, box.bottom - 14, ...candidates(t)); };
      fill(span, {onpointerenter: show, onpointerdown: show, onpointerleave: hideTip, onfocus: () => setTimeout(() => { if (document.activeElement === span) show(); }, 60), onblur: hideTip}, []);
      return span;
    });
    holder.replaceChildren(...spans);
    holder.setAttribute('role', 'list');
    const low = values.some(v => v < 0), mix = (side, w) => `color-mix(in srgb, var(--${side}) ${w}%, var(--sheet))`;
    const ramp = h('span', {class: 'ramp'});
    ramp.style.background = `linear-gradient(90deg, ${low ? mix('down', 70) : mix('up', 0)}, ${mix('up', low ? 0 : 35)}, ${mix('up', 70)})`;
    byId('token-scale').replaceChildren(h('span', {}, num(low ? -most : 0)), ramp, h('span', {}, `${num(most)} ${title}`));
    byId('token-table').replaceChildren(table(line.tokens));
  }
  function candidates(t) {
    const percent = v => {
      if (v === null || v === undefined) return '–';
      const p = 100 * Math.exp(v);
      return p < 1e-4 ? '≈ 0' : `${p >= 10 ? p.toFixed(0) : Number(p.toPrecision(2)).toString()} %`;
    };
    const withQ = t.candidates.some(c => c[3] !== null);
    const head = h('tr', {}, ['candidate', 'method', 'base', ...(withQ ? ['Q'] : [])].map(w => h('th', {}, w)));
    const body = t.candidates.map(([text, own, ref, q]) => h('tr', {class: text === t.text ? 'drawn' : null},
      h('td', {}, JSON.stringify(text).slice(1, -1)), h('td', {}, percent(own)), h('td', {}, percent(ref)), withQ ? h('td', {}, num(q)) : null));
    const line = Object.values(COLOURS).map(([name, , of]) => [name, of(t)]).filter(([, v]) => v !== null && v !== undefined).map(([name, v]) => `${name} ${num(v)}`).join(' · ');
    return [h('b', {}, JSON.stringify(t.text).slice(1, -1)), h('div', {class: 'under'}, line), h('table', {class: 'candidates'}, h('tbody', {}, head, body))];
  }
  function table(tokens) {
    const names = Object.keys(COLOURS), cells = t => names.map(n => h('td', {}, num(COLOURS[n][2](t))));
    return h('table', {class: 'numbers text-7'}, h('caption', {class: 'sr'}, 'Tokens of the response'),
      h('thead', {}, h('tr', {}, ['token', ...names.map(n => COLOURS[n][0]), 'likeliest candidates'].map(w => h('th', {scope: 'col'}, w)))),
      h('tbody', {}, tokens.map(t => h('tr', {}, h('th', {scope: 'row'}, JSON.stringify(t.text).slice(1, -1)), cells(t),
        h('td', {}, t.candidates.slice(0, 3).map(c => JSON.stringify(c[0]).slice(1, -1)).join(', '))))));
  }
  holder.addEventListener('keydown', event => {
    const step = {ArrowRight: 1, ArrowLeft: -1}[event.key], next = step && all('span', holder)[[...holder.children].indexOf(event.target) + step];
    if (event.key === 'Escape') hideTip();
    if (!next) return;
    event.preventDefault();
    event.target.tabIndex = -1;
    next.tabIndex = 0;
    next.focus();
  });
  response.addEventListener('change', fillPrompts);
  prompt.addEventListener('change', fillColours);
  colours.addEventListener('change', draw);
  fillPrompts();
}
const clip = (text, n) => { const line = text.replace(/\s+/g, ' '); return line.length > n ? `${line.slice(0, n - 1)}…` : line; };
