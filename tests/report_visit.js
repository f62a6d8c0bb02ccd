// Runs in a page that holds the report in frames of several widths; what it saw becomes the text of <pre>.
const wait = ms => new Promise(done => setTimeout(done, ms));
async function visit(frame) {
  const w = frame.contentWindow, d = w.document, all = q => [...d.querySelectorAll(q)], one = q => d.querySelector(q);
  const count = q => all(q).filter(e => e.getClientRects().length).length;
  const set = async (q, value, event) => { one(q).value = value; one(q).dispatchEvent(new w.Event(event)); await wait(30); };
  const click = async e => { e.click(); await wait(30); };
  const key = (e, name) => e.dispatchEvent(new w.KeyboardEvent('keydown', {key: name, bubbles: true, cancelable: true}));
  const out = {};
  out.wide = d.documentElement.scrollWidth - d.documentElement.clientWidth;
  for (const e of all('details')) e.open = true;
  await wait(50);
  out.wideOpen = d.documentElement.scrollWidth - d.documentElement.clientWidth;
  out.small = all('body *').filter(e => e.getClientRects().length && e.childNodes.length && parseFloat(w.getComputedStyle(e).fontSize) < 10).length;
  out.background = w.getComputedStyle(d.body).backgroundColor;
  out.plots = all('.plot svg').length;
  out.series = all('.plot')[0].querySelectorAll('g.series').length;
  out.over = all('#over figure').length;
  out.rows = count('#methods tbody tr');
  await click(all('#legend button')[1]);
  out.seriesLess = all('.plot')[0].querySelectorAll('g.series').length;
  out.rowsLess = count('#methods tbody tr');
  out.pressed = all('#legend button')[1].getAttribute('aria-pressed');
  await click(one('#legend .all'));
  out.seriesAgain = all('.plot')[0].querySelectorAll('g.series').length;
  await click(one('#all-settings'));
  out.rowsAll = count('#methods tbody tr');
  await click(all('#methods thead button')[2]);
  out.sorted = all('#methods tbody tr').map(e => e.cells[2].dataset.value);
  out.sort = all('#methods thead th')[2].getAttribute('aria-sort');
  const svg = one('.plot svg');
  key(svg, 'ArrowRight');
  out.tip = one('#tip').hidden ? '' : one('#tip').textContent;
  key(svg, 'Escape');
  out.tipAfter = one('#tip').hidden;
  out.columns = all('#sheet article')[0].querySelectorAll('.cell').length;
  out.articles = all('#sheet article').length;
  out.selects = all('#columns select').length;
  await set('#search', 'ABOUT 3', 'input');
  out.searched = all('#sheet article').length;
  out.marked = all('#sheet mark').map(e => e.textContent);
  await set('#search', 'no such words', 'input');
  out.nothing = [all('#sheet article').length, one('#found').textContent];
  await set('#search', '', 'input');
  await set('#filter', 'cut', 'change');
  out.cut = all('#sheet article').length;
  await set('#filter', 'hacked', 'change');
  out.hacked = all('#sheet article').length;
  await set('#filter', '', 'change');
  const select = all('#columns select')[1];
  const strong = [...select.options].find(o => o.textContent.includes('beta 0.5')).value;
  select.value = strong; select.dispatchEvent(new w.Event('change')); await wait(30);
  await set('#filter', 'hacked', 'change');
  out.hackedStrong = all('#sheet article').length;
  for (const s of all('#columns select')) { s.value = ''; s.dispatchEvent(new w.Event('change')); }
  await wait(30);
  out.none = one('#found').textContent;
  out.curves = all('#curves svg').length;
  out.images = all('img').length + all('script').length;
  out.prompt = JSON.parse(one('#data').textContent).prompts[0];
  return out;
}
addEventListener('load', async () => {
  const out = {};
  for (const frame of document.querySelectorAll('iframe')) {
    try { out[frame.width] = await visit(frame); } catch (error) { out[frame.width] = {error: String(error && error.stack)}; }
  }
  document.querySelector('pre').textContent = JSON.stringify(out);
});
