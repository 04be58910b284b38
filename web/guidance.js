// The guidance schedule, drawn as the sampler applies it.

// The scale for window `position` of `positions`: tokenshuffle_core/guidance.py in JavaScript.
export function scaleAt(schedule, cfg, position, positions) {
  if (schedule === 'constant') return cfg
  const ramp = schedule === 'linear' ? positions - 1 : positions / 2
  return 1 + (cfg - 1) * (ramp ? Math.min(1, position / ramp) : 1)
}

const WIDTH = 240
const HEIGHT = 48
const LEFT = 34 // room for the scales
const EDGE = 7

export function drawSchedule(svg, schedule, cfg, positions) {
  const scales = Array.from({ length: positions }, (_, i) => scaleAt(schedule, cfg, i, positions))
  const low = Math.min(1, ...scales)
  const high = Math.max(1, ...scales)
  const x = (i) => LEFT + (i / Math.max(1, positions - 1)) * (WIDTH - LEFT - EDGE)
  const y = (scale) => HEIGHT - EDGE - ((scale - low) / (high - low || 1)) * (HEIGHT - 2 * EDGE)
  const points = scales.map((scale, i) => `${x(i).toFixed(1)},${y(scale).toFixed(1)}`)
  const levels = [...new Set([low, high])]
  svg.setAttribute('viewBox', `0 0 ${WIDTH} ${HEIGHT}`)
  svg.replaceChildren(
    ...levels.map((scale) =>
      element('line', { x1: LEFT, x2: WIDTH - EDGE, y1: y(scale), y2: y(scale), class: 'grid' })
    ),
    ...levels.map((scale) =>
      element('text', { x: LEFT - 6, y: y(scale) + 4 }, String(Math.round(scale * 100) / 100))
    ),
    element('polyline', { points: points.join(' ') })
  )
}

function element(name, attributes, text = '') {
  const made = document.createElementNS('http://www.w3.org/2000/svg', name)
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value)
  made.textContent = text
  return made
}
