// How long the next picture takes, from what the last ones took.

// Seconds for sampling `pictures` at once with so many positions each and decoding them; undefined where
// no picture has been made yet. A step costs the more the more pictures it is for, and is cheaper for
// each: between two numbers of pictures and beyond, it is taken as a linear function of them.
export function estimate({ sampled, decoded, unit, stride }, positions, pictures, pixels) {
  if (!sampled?.length) return undefined
  const window = unit / stride
  const same = sampled.filter(([of]) => of === window)
  const costs = new Map((same.length ? same : sampled).map(([, n, count, time]) => [n, time / count]))
  const decoding = decoded ? (decoded[1] / decoded[0]) * pictures * pixels : 0
  return positions * costOf(pictures, costs) + decoding
}

// Seconds a position.
function costOf(pictures, costs) {
  if (costs.has(pictures)) return costs.get(pictures)
  const near = [...costs.keys()].sort((a, b) => Math.abs(a - pictures) - Math.abs(b - pictures))
  const [a, b] = near
  const cost = costs.get(a)
  if (b === undefined) return cost * Math.max(1, pictures / a)
  const slope = (costs.get(b) - cost) / (b - a)
  return Math.max(cost * Math.min(1, pictures / a), cost + slope * (pictures - a))
}
