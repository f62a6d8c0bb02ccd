// The figures of the page, drawn anew when a method is hidden or the width changes.
const shown = () => data.series.map((_, j) => j).filter(j => !hidden.has(j));

function pointTip(i) {
  const row = data.rows[i], line = (name, value) => h('tr', {}, h('td', {}, name), h('td', {}, value));
  const lines = data.measures.filter(m => m in row).map(m => line(WORDS[m], pm(row, m)));
  lines.push(line('KL', `${pm(row, 'kl')} nats`), line('kind of KL', row.kl_kind));
  return [h('b', {}, rowName(i)), h('table', {}, h('tbody', {}, lines))];
}

function drawFrontier() {
  for (const holder of all('.plot')) {
    const name = holder.dataset.measure, bases = data.series.filter(x => x.base);
    const order = shown().sort((a, b) => data.series[a].base - data.series[b].base);
    const lines = order.map(j => ({
      series: j, dashed: dash(j),
      points: data.series[j].rows.filter(i => name in data.rows[i]).map(i => {
        const row = data.rows[i];
        return {x: row.kl, y: row[name], ex: row.kl_95, ey: row[name + '_95'], tip: () => pointTip(i)};
      }),
    }));
    chart(holder, {
      title: {gold: 'Gold: the reward that no method sees', reward: 'Proxy: the reward that methods maximise'}[name],
      lines, kl: true, xLabel: 'KL to the base [nats]', describe: `${WORDS[name]} against KL`,
      base: bases.length === 1 ? data.rows[bases[0].best][name] : undefined,
    });
  }
}

function drawOver() {
  const holder = byId('over');
  if (!holder) return;
  const several = shown().filter(j => {
    const series = data.series[j], scored = series.rows.every(i => data.measures.every(m => m in data.rows[i]));
    return !series.base && series.rows.length > 1 && scored && 'gold' in data.bases[series.run];
  });
  for (const old of [...holder.children].slice(several.length)) old.remove();
  several.forEach((j, k) => {
    const figure = holder.children[k] || holder.appendChild(h('figure'));
    const run = data.series[j].run, home = data.rows[baseOf(run).best], spread = data.bases[run];
    const of = name => [home, ...data.series[j].rows.map(i => data.rows[i])].map((row, i) => ({
      x: row.kl, y: (row[name] - spread[name][0]) / spread[name][1],
      tip: () => i ? pointTip(data.series[j].rows[i - 1]) : [h('b', {}, 'the base')],
    }));
    chart(figure, {
      title: data.series[j].name, kl: true, height: 168, base: 0, describe: `${data.series[j].name}: gains of gold and proxy against KL`,
      lines: [{series: j, points: of('reward'), dashed: '3 4'}, {series: j, points: of('gold')}],
    });
  });
}

function drawCurves() {
  const holder = byId('curves');
  if (!holder) return;
  const select = byId('metric');
  if (!select.options.length) {
    const count = {};
    for (const run of data.training) for (const name of Object.keys(run.metrics)) count[name] = (count[name] || 0) + 1;
    const rank = name => (name === 'loss' ? 2e6 : 0) + count[name];
    const names = Object.keys(count).sort((a, b) => rank(b) - rank(a) || a.localeCompare(b));
    select.append(...names.map(name => h('option', {value: name}, name.replaceAll('_', ' '))));
    select.addEventListener('change', drawCurves);
  }
  const metric = select.value, runs = data.training.filter(run => metric in run.metrics);
  for (const old of [...holder.children].slice(runs.length)) old.remove();
  runs.forEach((run, k) => {
    const figure = holder.children[k] || holder.appendChild(h('figure')), [steps, values] = run.metrics[metric];
    chart(figure, {
      title: run.name, yLabel: short(values[values.length - 1]), height: 140, marks: false, describe: `${run.name}: ${metric} by step`,
      lines: [{series: -1, plain: true, points: steps.map((x, i) => ({
        x, y: values[i], tip: () => [h('b', {}, run.name), `step ${x}: ${metric.replaceAll('_', ' ')} ${short(values[i])}`],
      }))}],
    });
  });
}

function drawLegend() {
  const holder = byId('legend');
  if (!holder) return;
  const dim = j => all('.plot svg, #over svg').forEach(svg => light(svg, j));
  const toggle = j => { if (!hidden.delete(j)) hidden.add(j); changed(); };
  holder.replaceChildren(
    ...data.series.map((series, j) => h('button', {
      type: 'button', 'aria-pressed': String(!hidden.has(j)), 'data-series': j, onclick: () => toggle(j),
      onpointerenter: () => { if (!hidden.has(j)) dim(j); }, onpointerleave: () => dim(null),
    }, h('span', {class: 'mark'}, markSvg(j)), series.name)),
    h('button', {type: 'button', class: 'all', onclick: () => {
      if (hidden.size) hidden.clear(); else data.series.forEach((series, j) => { if (!series.base) hidden.add(j); });
      changed();
    }}, hidden.size ? 'Show all' : 'Hide all'),
  );
}

function changed() {
  const focus = document.activeElement, inside = focus && focus.closest('#legend') ? [...focus.parentNode.children].indexOf(focus) : -1;
  drawLegend();
  if (inside >= 0) byId('legend').children[inside].focus();
  drawFrontier();
  drawOver();
  for (const listener of listeners) listener();
}
