// How long the next picture takes, from what the last ones took.

// Seconds for sampling `pictures` at once with so many positions each and decoding them; undefined where
// no picture has been made yet. What was measured of the same kind is taken as it is. A step costs the
// more the more pictures it is for, and is cheaper for each: between two numbers of pictures and beyond,
// it is taken as a linear function of them.
export function estimate({ sampled, decoded, unit, stride }, positions, pictures, pixels) {
  if (!sampled?.length) return undefined
  const window = unit / stride
  const same = sampled.filter(([of]) => of === window)
  const far = ([, , count]) => distance(count, positions)
  const order = [...(same.length ? same : sampled)].sort((a, b) => far(b) - far(a))
  // Of each number of pictures, the last in this order stays: that with the nearest positions.
  const costs = new Map(order.map(([, n, count, time]) => [n, time / count]))
  return positions * costOf(pictures, costs) + decoding(decoded, pictures * pixels)
}

function decoding(decoded, pixels) {
  const order = [...(decoded ?? [])].sort(([a], [b]) => distance(a, pixels) - distance(b, pixels))
  return order.length ? (order[0][1] / order[0][0]) * pixels : 0
}

function distance(a, b) {
  return Math.abs(Math.log(a / b))
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
