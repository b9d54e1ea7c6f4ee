-- POST the JSON bodies of the file named in BODIES (one a line), at random; a report as one line of JSON at the end.
local requests, count = {}, 0

function init(args)
  math.randomseed(1)
  for line in io.lines(os.getenv("BODIES")) do
    count = count + 1
    requests[count] = wrk.format("POST", nil, {["Content-Type"] = "application/json"}, line)
  end
end

function request()
  return requests[math.random(count)]
end

function done(summary, latency, requests)
  local errors = summary.errors
  io.write(string.format(
    '\n{"requests": %d, "seconds": %.6f, "p50_ms": %.3f, "p99_ms": %.3f, "failed": %d}\n',
    summary.requests, summary.duration / 1e6, latency:percentile(50) / 1e3, latency:percentile(99) / 1e3,
    errors.connect + errors.read + errors.write + errors.status + errors.timeout
  ))
end
