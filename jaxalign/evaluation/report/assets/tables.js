// Marks in tables, rows of hidden methods, the best setting or all of them, sorting.
function dressTables() {
  for (const place of all('[data-mark]')) place.replaceChildren(markSvg(Number(place.dataset.mark)));
  const every = byId('all-settings');
  const rows = () => all('tr[data-series]').forEach(row => {
    const minor = every && !every.checked && row.closest('#methods') && !('best' in row.dataset);
    row.classList.toggle('off', minor || (hidden.has(Number(row.dataset.series)) && !row.closest('#wins')));
  });
  if (every) every.addEventListener('change', rows);
  listeners.push(rows);
  rows();
  all('table.sortable').forEach(sortable);
}

function sortable(table) {
  const heads = all('thead th', table), body = table.tBodies[0], original = [...body.rows];
  heads.forEach((head, k) => {
    const button = h('button', {type: 'button'}, head.textContent);
    head.replaceChildren(button);
    button.addEventListener('click', () => {
      const before = head.getAttribute('aria-sort'), next = {null: 'descending', descending: 'ascending', ascending: null}[before];
      heads.forEach(other => other.removeAttribute('aria-sort'));
      if (next) head.setAttribute('aria-sort', next);
      const value = row => row.cells[k].dataset.value, text = row => row.cells[k].textContent;
      const compare = (a, b) => value(a) === undefined && value(b) === undefined ? text(b).localeCompare(text(a), undefined, {numeric: true})
        : (value(b) ?? -Infinity) - (value(a) ?? -Infinity);
      const sorted = next ? [...original].sort((a, b) => next === 'descending' ? compare(a, b) : compare(b, a)) : original;
      body.append(...sorted);
    });
  });
}
