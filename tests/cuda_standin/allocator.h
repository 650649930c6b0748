// The bookkeeping of torch's caching allocator for one stream: which bytes it would reserve for what is allocated.
//
// It follows c10/cuda/CUDACachingAllocator.cpp of torch 2.11 to 2.13 with its default options and with
// `expandable_segments:True`. Addresses are numbers of its own; no memory is touched here.
#pragma once
#include <algorithm>
#include <cstdint>
#include <map>
#include <memory>
#include <set>

namespace caching {

constexpr int64_t MIB = 1 << 20;
constexpr int64_t SMALL_SIZE = MIB;          // requests up to here come from the pool of small blocks
constexpr int64_t SMALL_SEGMENT = 2 * MIB;   // what the small pool takes from the driver
constexpr int64_t LARGE_SEGMENT = 20 * MIB;  // what requests below 10 MiB take for the large pool
constexpr int64_t ROUND_LARGE = 2 * MIB;     // larger requests take a multiple of this
constexpr int64_t SPACE = LARGE_SEGMENT << 32;  // addresses of an expandable segment: more than any card has

struct Block {
  int64_t address, size;
  int pool;  // 0: small, 1: large
  bool is_free = true, is_mapped = true;
  Block *previous = nullptr, *next = nullptr;
};

struct BySize {
  bool operator()(const Block* a, const Block* b) const {
    return a->size != b->size ? a->size < b->size : a->address < b->address;
  }
};

class Allocator {
 public:
  bool is_expandable = false;
  int64_t limit = 0;  // bytes that the driver has; 0: no limit
  int64_t allocated = 0, reserved = 0, peak_allocated = 0, peak_reserved = 0;

  // A block for `size` bytes, or null where the driver has no memory left even after the cache was emptied.
  Block* allocate(int64_t size) {
    size = std::max<int64_t>(512, (size + 511) / 512 * 512);
    int pool = size <= SMALL_SIZE ? 0 : 1;
    Block* block = best_fit(pool, size);
    if (!block) block = from_driver(pool, size);
    if (!block) {
      empty_cache();
      block = from_driver(pool, size);
    }
    if (!block) return nullptr;
    int64_t rest = block->size - size;
    if (is_expandable || pool == 0 ? rest >= 512 : rest > SMALL_SIZE) free_[pool].insert(split(block, size));
    block->is_free = false;
    allocated += block->size;
    peak_allocated = std::max(peak_allocated, allocated);
    return block;
  }

  void release(Block* block) {
    allocated -= block->size;
    block->is_free = true;
    free_[block->pool].insert(merged(block));
  }

  // Give back what no tensor lies in: whole segments, or the pages of expandable ones.
  void empty_cache() {
    for (int pool : {0, 1}) {
      auto blocks = free_[pool];
      for (Block* block : blocks) {
        if (is_expandable) {
          unmap(block);
        } else if (!block->previous && !block->next) {
          free_[pool].erase(block);
          reserved -= block->size;
          owned_.erase(block->address);
        }
      }
    }
  }

 private:
  std::set<Block*, BySize> free_[2];
  std::map<int64_t, std::unique_ptr<Block>> owned_;
  Block* expandable_[2] = {nullptr, nullptr};  // the last block of the one segment of a pool: not mapped, endless
  int64_t next_segment_ = 0;

  int64_t page(int pool) const { return pool == 0 ? SMALL_SEGMENT : LARGE_SEGMENT; }

  Block* create(int64_t address, int64_t size, int pool) {
    auto& owned = owned_[address];
    owned.reset(new Block{address, size, pool});
    return owned.get();
  }

  // The block keeps `size` bytes; the rest is a block of its own, in the same state.
  Block* split(Block* block, int64_t size) {
    Block* rest = create(block->address + size, block->size - size, block->pool);
    rest->is_mapped = block->is_mapped;
    rest->previous = block;
    rest->next = block->next;
    if (rest->next) rest->next->previous = rest;
    block->next = rest;
    block->size = size;
    return rest;
  }

  // The block together with neighbours that are free and mapped as it is.
  Block* merged(Block* block) {
    auto joins = [&](Block* other) { return other && other->is_free && other->is_mapped == block->is_mapped; };
    if (joins(block->previous)) block = join(block->previous, block);
    if (joins(block->next)) block = join(block, block->next);
    return block;
  }

  Block* join(Block* first, Block* second) {
    free_[first->pool].erase(first);
    free_[first->pool].erase(second);
    if (expandable_[first->pool] == second) expandable_[first->pool] = first;
    first->size += second->size;
    first->next = second->next;
    if (first->next) first->next->previous = first;
    owned_.erase(second->address);
    return first;
  }

  Block* best_fit(int pool, int64_t size) {
    Block key{-1, size, pool};
    auto found = free_[pool].lower_bound(&key);
    if (found == free_[pool].end()) return nullptr;
    if (is_expandable) {  // a block that could grow counts with the room behind it, so that it is the last choice
      auto room = [](Block* b) { return b->size + (b->next && !b->next->is_mapped ? b->next->size : 0); };
      for (auto next = std::next(found); next != free_[pool].end() && room(*next) < room(*found); ++next) found = next;
    }
    Block* block = *found;
    free_[pool].erase(found);
    return block;
  }

  bool take(int64_t bytes) {
    if (limit && reserved + bytes > limit) return false;
    reserved += bytes;
    peak_reserved = std::max(peak_reserved, reserved);
    return true;
  }

  Block* from_driver(int pool, int64_t size) {
    if (is_expandable) return from_pages(pool, size);
    int64_t segment = pool == 0                  ? SMALL_SEGMENT
                      : size < LARGE_SEGMENT / 2 ? LARGE_SEGMENT
                                                 : (size + ROUND_LARGE - 1) / ROUND_LARGE * ROUND_LARGE;
    if (!take(segment)) return nullptr;
    next_segment_ += 2 * segment;  // no two segments touch
    return create(next_segment_ - segment, segment, pool);
  }

  // Pages mapped into the first run of free blocks that is long enough.
  Block* from_pages(int pool, int64_t size) {
    if (!expandable_[pool]) {
      expandable_[pool] = create(pool * 2 * SPACE, SPACE, pool);
      expandable_[pool]->is_mapped = false;
    }
    Block* start = nullptr;
    int64_t run = 0;
    Block* first = expandable_[pool];
    while (first->previous) first = first->previous;
    for (Block* block = first; block && run < size; block = block->next) {
      if (!block->is_free) {
        start = nullptr, run = 0;
        continue;
      }
      if (!start) start = block, run = 0;
      run += block->size;
    }
    while (!start->is_mapped || start->size < size) {
      Block* missing = start->is_mapped ? start->next : start;
      int64_t wanted = start->is_mapped ? size - start->size : size;
      int64_t bytes = std::min((wanted + page(pool) - 1) / page(pool) * page(pool), missing->size);
      if (!take(bytes)) {
        if (start->is_mapped) free_[pool].insert(start);
        return nullptr;
      }
      if (missing->size > bytes) {
        Block* rest = split(missing, bytes);
        if (expandable_[pool] == missing) expandable_[pool] = rest;
      }
      missing->is_mapped = true;
      start = merged(missing);
    }
    free_[pool].erase(start);
    return start;
  }

  // Whole pages within a free block go back to the driver.
  void unmap(Block* block) {
    int64_t unit = page(block->pool);
    int64_t start = (block->address + unit - 1) / unit * unit, end = (block->address + block->size) / unit * unit;
    if (start >= end) return;
    free_[block->pool].erase(block);
    if (start > block->address) {
      Block* rest = split(block, start - block->address);
      free_[block->pool].insert(block);
      block = rest;
    }
    if (end < block->address + block->size) free_[block->pool].insert(split(block, end - block->address));
    block->is_mapped = false;
    reserved -= block->size;
    merged(block);
  }
};

}  // namespace caching
