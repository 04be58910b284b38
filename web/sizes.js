// Sizes of pictures. A model as /tokenshuffle/model describes it: `sizes` are those it was trained at,
// the default one first, and it draws no others unless it has `any_size`; withWindow adds the pixels of
// one position, `unit`, and of the longest side.

const SHAPES = [[1, 1], [4, 3], [3, 4], [3, 2], [2, 3], [16, 9], [9, 16]]

export function withWindow(model, window) {
  const unit = model.stride * (window || model.windows[0])
  return { ...model, unit, max_side: unit * model.max_grid }
}

export function positions(width, height, { unit }) {
  return Math.ceil(width / unit) * Math.ceil(height / unit)
}

export function isTrained(width, height, { sizes }) {
  return sizes.some(([w, h]) => w === width && h === height)
}

// The nearest side length that the model can draw when the other side stays.
export function snap(side, other, { unit, max_side, max_positions }) {
  const units = Math.max(1, Math.round(side / unit))
  const room = Math.floor(max_positions / Math.max(1, Math.round(other / unit)))
  return Math.max(1, Math.min(units, room, max_side / unit)) * unit
}

// A model that says what sizes it was trained at is offered at those; any other also in the usual
// shapes of about the same area.
export function presets(model) {
  if (!model.any_size) return model.sizes
  const side = Math.sqrt(model.sizes[0][0] * model.sizes[0][1])
  const all = [...model.sizes]
  for (const [w, h] of SHAPES) {
    const width = snap(side * Math.sqrt(w / h), 0, model)
    const height = snap(side * Math.sqrt(h / w), width, model)
    if (!all.some((size) => size[0] === width && size[1] === height)) all.push([width, height])
  }
  return all
}

export function ratio(width, height) {
  let [a, b] = [width, height]
  while (b) [a, b] = [b, a % b]
  return `${width / a}:${height / a}`
}
