#pragma once
// The page ids of all sequences for one kind of layer: what PagedCache and RingCache have in
// common. They differ in how many pages a length needs and in which pages a step writes. Used on
// the engine thread, owned by KvCache.
#include <cstdint>
#include <vector>

#include "absl/functional/function_ref.h"
#include "absl/types/span.h"
#include "engine/page_pool.h"
#include "kernels/backend.h"

namespace longspan {

using SequenceId = int32_t;
// A row of a step that is no sequence's: at position 0, in a page that nobody reads.
inline constexpr SequenceId kNoSequence = -1;

class PageTable {
 public:
  virtual ~PageTable() = default;
  PageTable(const PageTable&) = delete;
  PageTable& operator=(const PageTable&) = delete;

  // Pages that a sequence of `tokens` tokens occupies.
  virtual int PagesFor(int64_t tokens) const = 0;

  // How many pages Prepare() would take.
  int64_t NewPages(SequenceId sequence, int64_t begin, int64_t end) const;
  // Makes the sequence ready for a step that computes positions [begin, end): room for them, and a
  // private copy of each shared page that the step writes. The pool must have NewPages() pages.
  void Prepare(SequenceId sequence, int64_t begin, int64_t end);
  void Share(SequenceId from, SequenceId to, int64_t tokens);  // `to` is empty
  void Clear(SequenceId sequence);
  // Gives one superblock back to the arena, moving its pages and their contents elsewhere.
  void Compact();

  // Fills row i of the backend's table with the pages of sequences[i], which may be kNoSequence.
  void Upload(const std::vector<SequenceId>& sequences);
  const int32_t* rows() const { return reinterpret_cast<const int32_t*>(device_.data()); }
  int slots() const { return slots_; }

  const PagePool& pool() const { return pool_; }
  const std::vector<int32_t>& pages(SequenceId sequence) const { return tables_[sequence].pages; }

 protected:
  // A slot that a step writes. kept: the step still needs what the page holds.
  struct Write {
    int slot;
    bool kept;
  };

  PageTable(Backend& backend, Arena* arena, int64_t page_bytes, int slots, int max_sequences);
  // Calls visit with each slot that a step which computes [begin, end) writes, of those whose pages
  // can be shared.
  virtual void ForEachWrite(int64_t begin, int64_t end,
                            absl::FunctionRef<void(Write)> visit) const = 0;

 private:
  friend class CacheTestPeer;

  struct Table {
    std::vector<int32_t> pages;  // by slot
    uint64_t version = 0;        // changes whenever pages change other than by growing
  };
  // What a row of the backend's table holds, so that only what is new is copied.
  struct Row {
    SequenceId sequence = kNoSequence;
    uint64_t version = 0;
    size_t pages = 0;
  };

  bool SharedAt(const Table& table, int slot) const;
  void CopyPage(int32_t from, int32_t to);

  Backend& backend_;
  Arena* arena_;
  PagePool pool_;
  int slots_;
  std::vector<Table> tables_;  // by SequenceId
  const Table waste_;          // of kNoSequence
  uint64_t versions_ = 0;
  Buffer device_;  // [max_sequences, slots] I32
  std::vector<Row> uploaded_;
};

}  // namespace longspan
