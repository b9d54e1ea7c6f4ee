"""The Lua scripts: what Redis must do in one step, with nothing in between."""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import sha1

from memory_service.store.redis.adapter import Command

STAMPS = """
local found = {}
for i, key in ipairs(KEYS) do
  local stamp = redis.call('GETRANGE', key, 8, 19)
  found[i] = stamp ~= '' and stamp or string.rep('\\0', 12)
end
return table.concat(found)
"""
"""Stamps of records (version and checksum), 12 bytes each; zeros where there is no record."""

COMMIT = """
local done = {}
for i, key in ipairs(KEYS) do
  if redis.call('GETRANGE', key, 8, 19) == ARGV[2 * i] then
    if ARGV[1] == '0' then
      redis.call('SET', key, ARGV[2 * i + 1])
    else
      redis.call('SET', key, ARGV[2 * i + 1], 'EX', ARGV[1])
    end
    done[i] = 1
  else
    done[i] = 0
  end
end
return done
"""
"""Store each record only if the record that it was computed from (stamp) is still there. ARGV: seconds until it expires
(0: never), then stamp and record for each key.
"""

FORGET = """
local current = redis.call('GETRANGE', KEYS[1], 8, 19)
if current ~= ARGV[1] then return 0 end
redis.call('DEL', KEYS[1])
return 1
"""
"""Delete a record only if it has this stamp."""

REGISTER = """
local overwrite, numbers = ARGV[1] == '1', {}
for i = 3, #ARGV, 3 do
  local id, about, hidden, changed = ARGV[i], ARGV[i + 1], ARGV[i + 2], false
  local number = redis.call('HGET', KEYS[1], id)
  local known = number
  if not number then
    number = redis.call('RPUSH', KEYS[2], id)
    redis.call('HSET', KEYS[1], id, number)
  end
  numbers[#numbers + 1] = tonumber(number)
  if about ~= '' and (overwrite or redis.call('HEXISTS', KEYS[3], id) == 0) then
    redis.call('HSET', KEYS[3], id, about)
    changed = true
  end
  if overwrite and hidden ~= '' then
    redis.call(hidden == '1' and 'SADD' or 'SREM', KEYS[4], id)
    changed = true
  end
  if changed and known then
    redis.call('INCR', KEYS[5])
    redis.call('LPUSH', KEYS[6], number)
  end
end
redis.call('LTRIM', KEYS[6], 0, ARGV[2] - 1)
return numbers
"""
"""Register items; returns their numbers. New items get the next ones; metadata is set where there is none, or on
overwrite. ARGV: overwrite, changes kept, then id, metadata and hidden flag (empty: leave as it is) of each item.
"""

CHANGED = """
local revision = tonumber(redis.call('GET', KEYS[1]) or '0')
local behind = revision - ARGV[1]
if behind < 0 or behind > redis.call('LLEN', KEYS[2]) then return {revision} end
return {revision, behind > 0 and redis.call('LRANGE', KEYS[2], 0, behind - 1) or {}}
"""
"""The revision, and the numbers of the items that changed since another revision if these are still known."""

SWAP = """
if (redis.call('GET', KEYS[1]) or '') ~= ARGV[1] then return 0 end
redis.call('SET', KEYS[1], ARGV[2])
return 1
"""
"""Set a small value only if it is still the expected one (empty: missing)."""

QUOTA = """
local used = tonumber(redis.call('GET', KEYS[1]) or '0')
local granted = math.max(0, math.min(tonumber(ARGV[1]), tonumber(ARGV[2]) - used))
if granted > 0 then
  redis.call('INCRBY', KEYS[1], granted)
  redis.call('EXPIRE', KEYS[1], ARGV[3])
end
return granted
"""
"""Grant as many of the wanted requests as the limit leaves. ARGV: wanted, limit, seconds to keep the count."""

BEAT = """
local clock = redis.call('TIME')
local now = clock[1] * 1000 + math.floor(clock[2] / 1000)
redis.call('ZREMRANGEBYSCORE', KEYS[1], '-inf', now)
local was_there = 0
if #ARGV > 0 then
  was_there = redis.call('ZREM', KEYS[1], '+' .. ARGV[1], '-' .. ARGV[1])
  redis.call('ZADD', KEYS[1], now + ARGV[3], ARGV[2] .. ARGV[1])
end
return {was_there, redis.call('ZRANGE', KEYS[1], 0, -1)}
"""
"""Count a memory replica as present for a while; returns whether it was, and all that are. By the clock of Redis. ARGV:
URL, + or -, milliseconds; or nothing, to look only.
"""

SCRIPTS = (STAMPS, COMMIT, FORGET, REGISTER, CHANGED, SWAP, QUOTA, BEAT)
_SHA = {text: sha1(text.encode()).hexdigest() for text in SCRIPTS}


def call(text: str, keys: Sequence[bytes | str], args: Sequence[bytes | str | int] = ()) -> Command:
    """The command that runs one of the SCRIPTS."""
    return ("EVALSHA", _SHA[text], len(keys), *keys, *args)
