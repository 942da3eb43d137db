// block_signals: where signals may meet a thread. One whose handler calls pthread_exit ends the thread that it meets,
// and few places survive that: elsewhere a lock stays taken, or a frame that must not throw ends the process.
#pragma once

#include <pthread.h>
#include <signal.h>

#include <condition_variable>
#include <initializer_list>
#include <mutex>

namespace edgerun {

// For debuggers, and for tests that end the thread. Linux allows 15 characters.
inline void name_thread(const char* name) {
#if defined(__APPLE__)
  pthread_setname_np(name);
#elif defined(__linux__)
  pthread_setname_np(pthread_self(), name);
#endif
}

// Signals to this thread, and to one that it starts meanwhile, wait: but not those that a thread's own code causes.
class SignalsHeld {
 public:
  SignalsHeld() {
    sigset_t held;
    sigfillset(&held);
    for (const int cause : {SIGABRT, SIGBUS, SIGFPE, SIGILL, SIGSEGV, SIGSYS, SIGTRAP}) sigdelset(&held, cause);
    pthread_sigmask(SIG_BLOCK, &held, &before_);
  }
  ~SignalsHeld() { pthread_sigmask(SIG_SETMASK, &before_, nullptr); }
  SignalsHeld(const SignalsHeld&) = delete;
  SignalsHeld& operator=(const SignalsHeld&) = delete;
  const sigset_t& before() const { return before_; }

 private:
  sigset_t before_;
};

// Signals that were held, and that `open` does not mask, come now. `lock` is released meanwhile, and stays so where the
// thread ends and its stack is not unwound. This frame and the next have nothing to destroy: they can be unwound at any
// instruction, which C++ code elsewhere cannot.
[[gnu::noinline]] inline void let_signals_in(const sigset_t& open, std::unique_lock<std::mutex>* lock) {
  sigset_t held;
  lock->unlock();
  pthread_sigmask(SIG_SETMASK, &open, &held);
  pthread_sigmask(SIG_SETMASK, &held, nullptr);
  lock->lock();
}

// Waits, and signals come meanwhile.
[[gnu::noinline]] inline void wait_with_signals(const sigset_t& open, std::condition_variable* changed,
                                                std::unique_lock<std::mutex>* lock) {
  sigset_t held;
  pthread_sigmask(SIG_SETMASK, &open, &held);
  changed->wait(*lock);
  pthread_sigmask(SIG_SETMASK, &held, nullptr);
}

}  // namespace edgerun
