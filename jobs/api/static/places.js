// Whether somebody can see this page, and which of a browser's windows may hold a stream.
//
// Browsers open six connections to a host over HTTP/1.1, for all of their windows together, and a
// stream keeps one: with six streams nothing else of this host would load in any window. So a window
// that nobody sees holds none, and of those that are seen only some: the others ask again and again.

const STREAMS = 3;
let stored = false; // left, and maybe kept by the browser for the way back

export function seen() { return !document.hidden && !stored; }

// Calls back whenever an answer of `seen` or `take` may have changed; returns the function that ends
// this.
export function watch(listener) {
  const controller = new AbortController();
  document.addEventListener("visibilitychange", listener, { signal: controller.signal });
  for (const name of ["pagehide", "pageshow", "focus", "blur"]) window.addEventListener(name, listener, { signal: controller.signal });
  return () => controller.abort();
}

window.addEventListener("pagehide", () => { stored = true; }, { capture: true });
window.addEventListener("pageshow", () => { stored = false; }, { capture: true });

// Takes a place for a stream: the function that gives it back, or null if all are taken.
export async function take() {
  // Over plain http from another machine there are no locks: of all windows one has the focus.
  if (!navigator.locks) return document.hasFocus() ? () => {} : null;
  for (let number = 1; number <= STREAMS; number += 1) {
    const free = await new Promise((resolve) => {
      navigator.locks.request(`beatless stream ${number}`, { ifAvailable: true },
        (lock) => (lock ? new Promise((release) => resolve(release)) : resolve(null))).catch(() => resolve(null));
    });
    if (free) return free;
  }
  return null;
}

// Whether a window that has a place may keep it.
export function mayStream() { return seen() && (Boolean(navigator.locks) || document.hasFocus()); }
