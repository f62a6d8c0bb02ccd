dressTables();
drawLegend();
drawFrontier();
drawOver();
drawCurves();
responses();
tokenView();

let width = document.documentElement.clientWidth, waiting = 0;
function redraw() {
  hideTip();
  drawFrontier();
  drawOver();
  drawCurves();
}
window.addEventListener('resize', () => {
  if (document.documentElement.clientWidth === width) return;  // a phone's address bar comes and goes
  width = document.documentElement.clientWidth;
  cancelAnimationFrame(waiting);
  waiting = requestAnimationFrame(redraw);
});
window.addEventListener('scroll', hideTip, {passive: true});

// Tables behind figures are printed open, as they were before.
let closed = [];
window.addEventListener('beforeprint', () => {
  closed = all('details:not([open])');
  closed.forEach(d => { d.open = true; });
});
window.addEventListener('afterprint', () => closed.forEach(d => { d.open = false; }));

// The section that is read is marked in the navigation.
const links = new Map(all('nav a').map(a => [a.hash.slice(1), a]));
const reader = new IntersectionObserver(entries => {
  for (const entry of entries) if (entry.isIntersecting) {
    links.forEach((a, id) => id === entry.target.id ? a.setAttribute('aria-current', 'true') : a.removeAttribute('aria-current'));
  }
}, {rootMargin: '-20% 0px -75% 0px'});
all('main > section').forEach(section => reader.observe(section));
